"""Weighted PageRank on the attention graph: a token is important when important tokens look at it (Zero-TPrune,
section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_page_rank(attention: Tensor, rounds: int, start: Tensor | None = None) -> Tensor:
    """Importance after `rounds` votes, in each of which a token hands its importance on to those it attends to.

    attention: (..., N, N), rows (queries) sum to 1. start: (..., N) importance before the first vote, None for equal
    ones. Returns (..., N) with the sum of `start`, or 1. O(rounds N²).
    """
    if start is None:
        start = torch.full_like(attention[..., 0, :], 1 / attention.shape[-1])
    rank = start.expand(attention.shape[:-1])[..., None, :]
    for _ in range(rounds):
        rank = rank @ attention
    return rank[..., 0, :]


def head_consensus(scores: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Root mean square over heads, so that one head's strong interest counts. scores: (B, H, N), each summing to 1 ->
    (B, N).

    low, high: heads whose scores, scaled to mean 1, vary less than `low` or more than `high` (variance over tokens) are
    left out; when all would be, none is.
    """
    if low is None and high is None:
        return scores.square().mean(-2).sqrt()
    spread = (scores / scores.mean(-1, keepdim=True)).var(-1, correction=0)  # (B, H)
    use = torch.ones_like(spread, dtype=torch.bool)
    use &= spread >= low if low is not None else True
    use &= spread <= high if high is not None else True
    use |= ~use.any(-1, keepdim=True)
    weight = use.to(scores.dtype)[..., None]
    return ((scores.square() * weight).sum(-2) / weight.sum(-2)).sqrt()
