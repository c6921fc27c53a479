"""Greedy choice of a subset: farthest points, largest volume, facilities that cover all others.

Each is a loop over the kept tokens; on a CUDA device the whole loop is one kernel (`tokprune.ops.kernels.greedy`). Of
more tokens than `tokprune.ops.blocks.WHOLE` no matrix of all pairs is held: the loops make the rows that they need.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokprune.device import with_kernel
from tokprune.ops import blocks
from tokprune.ops.blocks import Rows, row_blocks, whole
from tokprune.ops.similarity import cosine_distance, unit

LAZY = 2**16
"""Entries of a matrix above which looking for columns to make anew takes less time than making all anew, on a CPU."""
RowOf = Callable[[Tensor, Tensor], Tensor]
"""The row of each item's pick: pick (B,) and the worth of all tokens (B, N) -> (B, N)."""


def greedy_farthest(features: Tensor, keep: int, gain: Tensor | None = None, low: float | None = None) -> Tensor:
    """`greedy_max_min` on the cosine distance, from the token whose nearest neighbour is farthest.

    features: (B, N, D). gain: (B, N), not negative, by which the distance to each token is multiplied; None for 1. low:
    distances below it (by rounding) are raised to it. Returns (B, keep) in the order of choice.
    """
    features = features.detach()

    def scaled(distance: Tensor, by: Tensor | None) -> Tensor:
        distance = distance if low is None else distance.clamp_min_(low)
        return distance if by is None else distance.mul_(by)

    if whole(features.shape[1], features.shape[1]):
        distance = scaled(cosine_distance(features), None if gain is None else gain[:, None])  # (B, N, N)
        distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)  # nobody is one's own neighbour; no step looks there
        return greedy_max_min(distance, distance.amin(-1 if gain is None else -2).argmax(-1), keep)
    found = []
    for i, rows in enumerate(unit(features)):
        by = None if gain is None else gain[i]
        lazy = Rows(lambda which, rows=rows, by=by: scaled((rows[which] @ rows.T).neg_().add_(1), by))  # type: ignore[misc]
        first = scaled(_nearest(rows), by).argmax(-1, keepdim=True)
        found.append(_max_min(lambda pick, worth, lazy=lazy: lazy.row(pick, worth[0])[None], rows, first, keep))  # type: ignore[misc]
    return torch.cat(found)


def _nearest(rows: Tensor) -> Tensor:
    """Distance of each token to its nearest neighbour, block by block, each pair once. rows: (N, D) -> (N,)."""
    best = torch.full_like(rows[:, 0], torch.inf)
    for part in row_blocks(len(rows)):
        distance = (rows[part] @ rows[part.start :].T).neg_().add_(1)  # (m, N - start)
        distance.diagonal().fill_(torch.inf)
        best[part] = best[part].minimum(distance.amin(1))
        best[part.stop :] = best[part.stop :].minimum(distance[:, len(distance) :].amin(0))
    return best


@with_kernel("greedy")
def greedy_max_min(distance: Tensor, first: Tensor, keep: int) -> Tensor:
    """Pick `keep` points, each as far as possible from those already picked.

    distance: (B, N, N). first: (B,) index of the first pick. Returns (B, keep) in the order of choice. Ties go to the
    lower index; a picked point is never picked again. No host synchronisation.
    """
    which = torch.arange(len(distance), device=distance.device)
    return _max_min(lambda pick, _: distance[which, pick], distance[0], first, keep)


def _max_min(row_of: RowOf, like: Tensor, first: Tensor, keep: int) -> Tensor:
    """The loop of `greedy_max_min`. like: (N, ...) of the dtype and device of distances."""
    which = torch.arange(len(first), device=like.device)
    order = torch.empty(len(first), keep, dtype=torch.long, device=like.device)
    nearest = torch.full((len(first), len(like)), torch.inf, dtype=like.dtype, device=like.device)
    pick = first
    for step in range(keep):
        order[:, step] = pick
        nearest = torch.minimum(nearest, row_of(pick, nearest))
        nearest[which, pick] = -torch.inf  # stays -inf: every later minimum keeps it
        pick = nearest.argmax(-1)
    return order


@torch.no_grad()
@with_kernel("greedy")
def greedy_map(kernel: Tensor, keep: int, fallback: Tensor) -> Tensor:
    """Pick `keep` items, each adding the most volume to those already picked (incremental Cholesky factor).

    kernel: (B, N, N), symmetric and positive semi-definite. An item whose remaining volume is rounding noise of its own
    diagonal adds nothing: once only such items are left (the kernel's rank is used up), picks follow `fallback` (B, N),
    highest first. Ties go to the lower index; an item is never picked twice.

    Returns (B, keep) in the order of choice. O(K² N) time, O(K N) memory, no host synchronisation.
    """
    which = torch.arange(len(kernel), device=kernel.device)
    return map_by_rows(lambda pick, _: kernel[which, pick], kernel.diagonal(dim1=-2, dim2=-1), keep, fallback)[0]


@torch.no_grad()
def map_by_rows(row_of: RowOf, own: Tensor, keep: int, fallback: Tensor) -> tuple[Tensor, Tensor]:
    """`greedy_map` for a kernel that is not held, and the volume that each pick added, -inf by `fallback`, both (B,
    keep). row_of: rows of the kernel. own: (B, N), its diagonal.
    """
    (batch, n), device, dtype = own.shape, own.device, own.dtype
    which = torch.arange(batch, device=device)
    noise = 100 * torch.finfo(dtype).eps * own
    best_first = torch.sort(fallback, dim=-1, descending=True, stable=True).indices
    places = torch.arange(n, device=device, dtype=dtype).expand(batch, n)
    behind = -1 - torch.empty_like(places).scatter(
        -1, best_first, places
    )  # (B, N): below every volume, best nearest to it

    order = torch.empty(batch, keep, dtype=torch.long, device=device)
    added = torch.full((batch, keep), -torch.inf, dtype=dtype, device=device)
    factor = torch.zeros(batch, keep, n, dtype=dtype, device=device)
    volume = own.clone()
    for step in range(keep):
        live = volume > noise
        pick = torch.where(live, volume, behind).masked_fill(torch.isneginf(volume), -torch.inf).argmax(-1)  # (B,)
        order[:, step] = pick
        added[:, step] = torch.where(live, volume, -torch.inf)[which, pick]
        known = (factor[which, :step, pick][:, None] @ factor[:, :step])[:, 0]  # (B, N) = sum over k of c_k[pick] c_k
        scale = live[which, pick] / volume[which, pick].clamp_min(torch.finfo(dtype).tiny).sqrt()
        row = (row_of(pick, volume) - known) * scale[:, None]
        factor[:, step] = row
        volume = volume - row * row
        volume[which, pick] = -torch.inf  # stays: only finite values are taken away from it
    return order, added


@with_kernel("greedy")
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
    zero). With best_r the best cover so far, gain_j = w_j * sum over r of max(0, S_rj - best_r) + bonus_j; weights (not
    negative), bonus: (B, N), None for 1 and 0. barred: (B, N) bool, columns that are picked only when no other is left.

    Returns the order of choice and the gains, both (B, keep). Ties go to the lower index; a picked column is never
    picked again, also when nothing is left to gain. O(K R N) at most, no host synchronisation. On a CPU, where looking
    at numbers costs nothing, gains of a large matrix are made anew only where they may be the largest: O(R N) and a few
    columns a pick.
    """
    similarity = similarity.detach()
    batch, rows, n = similarity.shape
    large = similarity.device.type == "cpu" and rows * n > LAZY
    if large and (weights is None or bool((weights >= 0).all())):
        held, item = similarity.mT.contiguous(), torch.arange(batch)[:, None]
        optional = [None if x is None else x.detach().expand(batch, -1) for x in (weights, start, bonus, barred)]
        numbers = torch.arange(n).expand(batch, n)
        return _lazily(lambda which: held[item, which], numbers, keep, *optional)
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


def lazy_coverage(
    columns: Callable[[Tensor], Tensor],
    numbers: Tensor,
    keep: int,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    bonus: Tensor | None = None,
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`greedy_coverage_gains` of one item, of which columns are made that may be the next. The host waits.

    columns: (m,) numbers -> (m, R). numbers: (N,) of all columns, 0, 1, ... The rest as there, without the batch.
    Returns the order of choice and the gains, both (keep,).
    """
    optional = [None if x is None else x[None] for x in (weights, start, bonus, barred)]
    order, gains = _lazily(lambda which: columns(which[0])[None], numbers[None], keep, *optional)
    return order[0], gains[0]


@torch.no_grad()
def _lazily(
    columns: Callable[[Tensor], Tensor],
    numbers: Tensor,
    keep: int,
    weights: Tensor | None,
    start: Tensor | None,
    bonus: Tensor | None,
    barred: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`lazy_coverage` of a batch. columns: (B, m) numbers -> (B, m, R). numbers: (B, N).

    A gain only falls while the cover grows, so that an old one is a bound: the best bound that is still the best when
    it is made anew is the largest gain (Minoux's lazy greedy). What else is made anew meanwhile, for other items of the
    batch or beside it, changes no choice.
    """
    n = numbers.shape[1]
    best = torch.zeros_like(columns(numbers[:, :1])[:, 0]) if start is None else start  # (B, R)

    def gains_of(which: Tensor) -> Tensor:  # (B, m) -> (B, m)
        gain = columns(which).sub_(best[:, None]).clamp_min_(0).sum(-1)  # made for this, so overwritten
        gain = gain if weights is None else gain * weights.gather(1, which)
        return gain if bonus is None else gain + bonus.gather(1, which)

    worth = torch.cat([gains_of(part) for part in numbers.split(-(-blocks.ROWS // 8), 1)], 1)  # few: in cache
    free, known = torch.ones_like(worth, dtype=torch.bool), torch.zeros_like(worth, dtype=torch.bool)
    if barred is not None:
        worth = worth.masked_fill(barred, -torch.inf)
    order, gains = torch.empty_like(numbers[:, :keep]), torch.empty_like(worth[:, :keep])
    for step in range(keep):
        known.zero_()
        width = 8
        pick = worth.argmax(-1, keepdim=True)  # (B, 1)
        if barred is not None and bool((left := torch.isneginf(worth.gather(1, pick))).any()):  # none but barred ones
            pick = torch.where(left, free.to(torch.uint8).argmax(-1, keepdim=True), pick)
            worth.scatter_(1, pick, torch.where(left, gains_of(pick), worth.gather(1, pick)))
            known.scatter_(1, pick, left)
        while not bool(known.gather(1, pick).all()):
            which = torch.cat([pick, worth.topk(min(width, n, blocks.ROWS)).indices], 1)
            old = worth.gather(1, which)
            worth.scatter_(1, which, torch.where(torch.isneginf(old), old, gains_of(which)))
            known.scatter_(1, which, True)
            pick, width = worth.argmax(-1, keepdim=True), 2 * width
        order[:, step], gains[:, step] = pick[:, 0], worth.gather(1, pick)[:, 0]
        best = torch.maximum(best, columns(pick)[:, 0])
        worth.scatter_(1, pick, -torch.inf)
        free.scatter_(1, pick, False)
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
