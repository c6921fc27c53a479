"""Each token's nearest among a few chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.distance import unit


def nearest_target(features: Tensor, targets: Tensor) -> Tensor:
    """Which of the targets each token is most similar to (cosine). O(N K D).

    features: (B, N, D). targets: (B, K) indices into N. Returns (B, N), a place in 0 .. K-1; a target belongs to itself, also
    when another one is its duplicate. Ties go to the lower place.
    """
    rows = unit(features)
    chosen = rows.gather(1, targets[..., None].expand(-1, -1, rows.shape[-1]))
    place = (rows @ chosen.transpose(1, 2)).argmax(-1)
    own = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    return place.scatter(1, targets, own)
