"""FlashVID's stage before the LLM as its authors run it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokprune.methods.connector.flashvid import flashvid_flow, flashvid_published_parts
from tokprune.ops.frames import similar_runs
from tokprune.ops.numeric import wide
from tokprune.tokens import Layout, Merge


def flashvid(
    features: Tensor,
    attention: Tensor,
    retention: float = 0.1,
    expansion: float = 1.25,
    alpha: float = 0.7,
    segments: int = 8,
    cut: float = 0.9,
    threshold: float = 0.8,
) -> tuple[Tensor, Tensor]:
    """The published code. features: (T, N, C), attention: (T, N).

    Returns positions (K,), ascending, and their tokens (K, C). In scenes of one frame a position may come twice: as the
    token that stays, and as a cluster.
    """
    frames, n, _ = features.shape
    x = wide(features).flatten(0, 1)
    lengths = similar_runs(wide(features).mean(1), segments - 1, cut)
    layout = Layout.grid(1, n, frames, "video").to(x.device)
    parts = flashvid_published_parts(math.ceil(n * retention * expansion), n, lengths, alpha)
    parts = parts._replace(twice=True)
    diverse, goal, weight = flashvid_flow(x, wide(attention).flatten(), layout, lengths, parts, threshold, True)
    centre = (goal == torch.arange(len(goal), device=goal.device)).nonzero()[:, 0]
    row = torch.full_like(goal, -1).scatter(0, centre, torch.arange(len(centre), device=goal.device))
    clusters = Merge(target=torch.where(goal >= 0, row[goal.clamp(min=0)], -1), scale=weight).apply(x, len(centre))
    kept = diverse.nonzero()[:, 0]
    position, order = torch.cat([kept, centre]).sort(stable=True)
    return position, torch.cat([x[kept], clusters])[order]
