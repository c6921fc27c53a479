"""Density peaks with k nearest neighbours (DPC-kNN): cluster centres are dense points far from any denser one."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.blocks import row_blocks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import distances
from tokprune.ops.topk import ranks

COPY = 1e-3  # of the largest distance: what rounding leaves between copies of one point


class Distances:
    """Distances of all pairs of points divided by the square root of the width: held while they are few, made again in
    blocks of rows where they are many. points: (B, n, C).
    """

    def __init__(self, points: Tensor) -> None:
        self._points = points
        self.parts = list(row_blocks(points.shape[1]))
        self._held: Tensor | None = None

    def __getitem__(self, part: slice) -> Tensor:
        """Distances of some points, one of `parts`, to all. -> (B, m, n)."""
        if self._held is not None:
            return self._held
        rows = distances(self._points[:, part], self._points) / self._points.shape[-1] ** 0.5
        if len(self.parts) > 1:
            return rows
        # Without rounding: two points that are nearest to each other are equally dense.
        rows = (rows + rows.mT) / 2
        rows.diagonal(dim1=1, dim2=2).zero_()
        self._held = rows
        return rows


def density(distance: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """exp(-mean of the k smallest squared distances), the point itself among them.

    distance: (B, m, n) of m points to all. k: one number, or (B,) one per row. valid: (B, n) bool; other points are
    nobody's neighbour. Where fewer than k are valid, the mean is taken over those. Returns (B, m).
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


def centre_scores(distance: Distances, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Score of each point as a cluster centre: density times distance to the nearest denser point.

    The densest point gets the largest distance of all pairs. Equally dense points are not denser than each other, but
    of copies of one point the lower index counts as denser, so that they do not become centres beside each other; the
    published codes leave both to random noise of 1e-6 in the density.

    k as in `density`, valid: (B, n) bool or None. Returns (B, n); -1 for points that are not valid.
    """
    rho = torch.cat([density(distance[part], k, valid) for part in distance.parts], -1)
    far, apart = [], []
    for part in distance.parts:
        pairs = None if valid is None else valid[:, None, :] & valid[:, part, None]  # (B, m, n)
        far.append((distance[part] if pairs is None else distance[part].masked_fill(~pairs, 0)).flatten(1).amax(-1))
    farthest = torch.stack(far).amax(0)[:, None, None]
    place = torch.arange(rho.shape[1], device=rho.device)
    for part in distance.parts:
        here, there = rho[:, part, None], rho[:, None, :]
        copy = (there == here) & (place < place[part, None]) & (distance[part] <= COPY * farthest)
        denser = (there > here) | copy  # (B, m, n)
        denser = denser if valid is None else denser & valid[:, None, :]
        apart.append(torch.where(denser, distance[part], farthest).amin(-1))
    score = rho * torch.cat(apart, -1)
    return score if valid is None else score.masked_fill(~valid, -1.0)


def to_centres(distance: Distances, centre: Tensor) -> Tensor:
    """The nearest centre of each point, ties to the lower index; a centre belongs to itself.

    centre: (B, n) bool. Returns (B, n) positions; meaningless in rows without a centre.
    """
    own = torch.arange(centre.shape[-1], device=centre.device)
    there = ~centre[:, None, :]
    nearest = torch.cat([distance[part].masked_fill(there, torch.inf).argmin(-1) for part in distance.parts], -1)
    return torch.where(centre, own, nearest)


def dpc_knn(
    points: Tensor, counts: Tensor, k: int | Tensor, valid: Tensor | None = None, block: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each row's points into counts[row] clusters around its density peaks.

    points: (B, n, C). counts: (B,) long, at most the row's valid points. k: nearest neighbours, one number or (B,).
    valid: (B, n) bool. `block` rows at a time, so that memory stays O(block n² + B n), and O(n) where n is large (see
    `Distances`). Arithmetic in float32 (float64 stays).

    Returns, all (B, n): which points are centres (bool); the centre of each point, itself for a centre and -1 for
    points that are not valid or in rows without a centre; the score as a centre. Ties go to the lower index.
    """
    chosen, into, scores = [], [], []
    for begin in range(0, points.shape[0], block):
        part = points[begin : begin + block]
        here = None if valid is None else valid[begin : begin + block]
        count = counts[begin : begin + block, None]
        distance = Distances(wide(part))
        score = centre_scores(distance, k[begin : begin + block] if isinstance(k, Tensor) else k, here)
        centre = ranks(score) < count
        own = to_centres(distance, centre)
        lost = (count == 0).expand_as(own) if here is None else (count == 0) | ~here
        chosen.append(centre)
        into.append(own.masked_fill(lost, -1))
        scores.append(score)
    return torch.cat(chosen), torch.cat(into), torch.cat(scores)
