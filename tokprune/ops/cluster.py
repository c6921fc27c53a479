"""Density peaks with k nearest neighbours (DPC-kNN): cluster centres are dense points far from any denser one."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.topk import ranks


def euclidean(points: Tensor) -> Tensor:
    """Distances of all pairs divided by the square root of the width. points: (B, n, C) -> (B, n, n)."""
    return torch.cdist(points, points) / points.shape[-1] ** 0.5


def density(distance: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """exp(-mean of the k smallest squared distances), the point itself among them.

    distance: (B, n, n). k: one number, or (B,) one per row. valid: (B, n) bool; other points are nobody's neighbour.
    Where fewer than k are valid, the mean is taken over those. Returns (B, n).
    """
    square = distance.square()
    if valid is not None:
        square = square.masked_fill(~valid[:, None, :], torch.inf)
    n = distance.shape[-1]
    most = n if isinstance(k, Tensor) else min(k, n)
    nearest = square.sort(dim=-1).values if most == n else square.topk(most, dim=-1, largest=False).values
    real = torch.isfinite(nearest)
    if isinstance(k, Tensor):
        real = real & (torch.arange(n, device=k.device) < k[:, None, None])
    return (-(nearest.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1))).exp()


def centre_scores(distance: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Score of each point as a cluster centre: density times distance to the nearest denser point.

    The densest point gets the largest distance of all pairs. distance: (B, n, n), k as in `density`, valid: (B, n) bool
    or None. Returns (B, n); -1 for points that are not valid.
    """
    rho = density(distance, k, valid)
    denser = rho[:, None, :] > rho[:, :, None]
    if valid is None:
        far = distance.flatten(1).amax(-1)
    else:
        far = distance.masked_fill(~(valid[:, None, :] & valid[:, :, None]), 0).flatten(1).amax(-1)
        denser = denser & valid[:, None, :]
    score = rho * torch.where(denser, distance, far[:, None, None]).amin(-1)
    return score if valid is None else score.masked_fill(~valid, -1.0)


def to_centres(distance: Tensor, centre: Tensor) -> Tensor:
    """The nearest centre of each point, ties to the lower index; a centre belongs to itself.

    distance: (B, n, n). centre: (B, n) bool. Returns (B, n) positions; meaningless in rows without a centre.
    """
    own = torch.arange(distance.shape[-1], device=distance.device)
    nearest = distance.masked_fill(~centre[:, None, :], torch.inf).argmin(-1)
    return torch.where(centre, own, nearest)


def dpc_knn(
    points: Tensor, counts: Tensor, k: int | Tensor, valid: Tensor | None = None, block: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each row's points into counts[row] clusters around its density peaks.

    points: (B, n, C). counts: (B,) long, at most the row's valid points. k: nearest neighbours, one number or (B,).
    valid: (B, n) bool. `block` rows at a time, so that memory stays O(block n² + B n). Arithmetic in float32 (float64
    stays).

    Returns, all (B, n): which points are centres (bool); the centre of each point, itself for a centre and -1 for
    points that are not valid or in rows without a centre; the score as a centre. Ties go to the lower index.
    """
    chosen, into, scores = [], [], []
    for begin in range(0, points.shape[0], block):
        part = points[begin : begin + block].detach()
        here = None if valid is None else valid[begin : begin + block]
        count = counts[begin : begin + block, None]
        distance = euclidean(part if part.dtype == torch.float64 else part.float())
        score = centre_scores(distance, k[begin : begin + block] if isinstance(k, Tensor) else k, here)
        centre = ranks(score) < count
        own = to_centres(distance, centre)
        lost = (count == 0).expand_as(own) if here is None else (count == 0) | ~here
        chosen.append(centre)
        into.append(own.masked_fill(lost, -1))
        scores.append(score)
    return torch.cat(chosen), torch.cat(into), torch.cat(scores)
