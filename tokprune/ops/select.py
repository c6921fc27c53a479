"""Greedy choice of a subset: farthest points, and facilities that cover all others."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_max_min(distance: Tensor, first: Tensor, keep: int) -> Tensor:
    """Pick `keep` points, each as far as possible from those already picked.

    distance: (B, N, N). first: (B,) index of the first pick. Returns (B, keep) in the order of choice. Ties go to the
    lower index; a picked point is never picked again. No host synchronisation.
    """
    batch, n, _ = distance.shape
    rows = torch.arange(batch, device=distance.device)
    order = torch.empty(batch, keep, dtype=torch.long, device=distance.device)
    nearest = torch.full((batch, n), torch.inf, dtype=distance.dtype, device=distance.device)
    pick = first
    for step in range(keep):
        order[:, step] = pick
        nearest = torch.minimum(nearest, distance[rows, pick])
        nearest[rows, pick] = -torch.inf  # stays -inf: every later minimum keeps it
        pick = nearest.argmax(-1)
    return order


def greedy_coverage_gains(
    similarity: Tensor,
    keep: int,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    bonus: Tensor | None = None,
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick `keep` columns one by one, each with the largest gain, and say what each gained.

    similarity: (B, R, N), how well column j covers row r. start: (B, R), what is covered before the first pick (None:
    zero). With best_r the best cover so far, gain_j = w_j * sum over r of max(0, S_rj - best_r) + bonus_j; weights,
    bonus: (B, N), None for 1 and 0. barred: (B, N) bool, columns that are picked only when no other is left.

    Returns the order of choice and the gains, both (B, keep). Ties go to the lower index; a picked column is never
    picked again, also when nothing is left to gain. O(K R N), no host synchronisation.
    """
    similarity = similarity.detach()
    batch, rows, n = similarity.shape
    device, dtype = similarity.device, similarity.dtype
    which = torch.arange(batch, device=device)
    best = (
        torch.zeros(batch, rows, dtype=dtype, device=device) if start is None else start.detach().to(similarity).clone()
    )
    last = torch.zeros(batch, n, dtype=torch.bool, device=device) if barred is None else barred
    taken = torch.zeros(batch, n, dtype=torch.bool, device=device)
    order = torch.empty(batch, keep, dtype=torch.long, device=device)
    gains = torch.empty(batch, keep, dtype=dtype, device=device)
    uncovered = torch.empty_like(similarity)
    worst = torch.finfo(dtype).min
    for step in range(keep):
        torch.sub(similarity, best[:, :, None], out=uncovered)
        gain = uncovered.clamp_min_(0).sum(-2)  # (B, N)
        if weights is not None:
            gain = gain * weights.detach()
        if bonus is not None:
            gain = gain + bonus.detach()
        pick = gain.masked_fill(last, worst).masked_fill(taken, -torch.inf).argmax(-1)  # (B,)
        order[:, step] = pick
        gains[:, step] = gain[which, pick]
        taken[which, pick] = True
        best = torch.maximum(best, similarity[which, :, pick])
    return order, gains


def greedy_coverage(
    similarity: Tensor,
    keep: int,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    bonus: Tensor | None = None,
    barred: Tensor | None = None,
) -> Tensor:
    """The order of choice of `greedy_coverage_gains`, without the gains. similarity: (B, R, N) -> (B, keep)."""
    return greedy_coverage_gains(similarity, keep, weights, start, bonus, barred)[0]
