"""k-nearest merge: each kept token takes up a little of its nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.distance import unit


def neighbour_rows(keys: Tensor, kept: Tensor, weights: Tensor, neighbours: int) -> Tensor:
    """Merge weights of "itself once, plus its nearest others by their weights".

    keys: (B, N, C), compared by cosine. kept: (B, K) indices. weights: (B, N), what a token brings into a row when it is a
    neighbour. Neighbours are the min(neighbours, N - 1) most similar other tokens, kept ones included; ties go to the lower
    index. Returns rows (B, K, N), not normalised. O(K N C).
    """
    rows = unit(keys)
    n = rows.shape[1]
    similarity = rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[-1])) @ rows.transpose(1, 2)  # (B, K, N)
    similarity.scatter_(2, kept[..., None], -torch.inf)  # never one's own neighbour
    nearest = torch.sort(similarity, dim=-1, descending=True, stable=True).indices[..., : min(neighbours, n - 1)]
    brought = weights.to(rows)[:, None, :].expand(-1, kept.shape[1], -1).gather(2, nearest)
    return torch.zeros_like(similarity).scatter_(2, nearest, brought).scatter_(2, kept[..., None], 1.0)
