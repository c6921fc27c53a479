"""Greedy choice of a subset: farthest points, largest volume, facilities that cover all others.

Each is a loop over the kept tokens; on a CUDA device the whole loop is one kernel (`tokprune.ops.kernels.greedy`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.device import with_kernel


@with_kernel("greedy")
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


@torch.no_grad()
@with_kernel("greedy")
def greedy_map(kernel: Tensor, keep: int, fallback: Tensor) -> Tensor:
    """Pick `keep` items, each adding the most volume to those already picked (incremental Cholesky factor).

    kernel: (B, N, N), symmetric and positive semi-definite. An item whose remaining volume is rounding noise of its own
    diagonal adds nothing: once only such items are left (the kernel's rank is used up), picks follow `fallback` (B, N),
    highest first. Ties go to the lower index; an item is never picked twice.

    Returns (B, keep) in the order of choice. O(K² N) time, O(K N) memory, no host synchronisation.
    """
    batch, n, _ = kernel.shape
    device, dtype = kernel.device, kernel.dtype
    which = torch.arange(batch, device=device)
    own = kernel.diagonal(dim1=-2, dim2=-1)  # (B, N)
    noise = 100 * torch.finfo(dtype).eps * own
    best_first = torch.sort(fallback, dim=-1, descending=True, stable=True).indices
    places = torch.arange(n, device=device, dtype=dtype).expand(batch, n)
    behind = -1 - torch.empty_like(places).scatter(
        -1, best_first, places
    )  # (B, N): below every volume, best nearest to it

    order = torch.empty(batch, keep, dtype=torch.long, device=device)
    factor = torch.zeros(batch, keep, n, dtype=dtype, device=device)
    volume = own.clone()
    for step in range(keep):
        live = volume > noise
        pick = torch.where(live, volume, behind).masked_fill(torch.isneginf(volume), -torch.inf).argmax(-1)  # (B,)
        order[:, step] = pick
        known = (factor[which, :step, pick][:, None] @ factor[:, :step])[:, 0]  # (B, N) = sum over k of c_k[pick] c_k
        scale = live[which, pick] / volume[which, pick].clamp_min(torch.finfo(dtype).tiny).sqrt()
        row = (kernel[which, pick] - known) * scale[:, None]
        factor[:, step] = row
        volume = volume - row * row
        volume[which, pick] = -torch.inf  # stays: only finite values are taken away from it
    return order


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
    at numbers costs nothing, gains are made anew only where they may be the largest: O(R N) and a few columns a pick.
    """
    similarity = similarity.detach()
    batch, rows, n = similarity.shape
    if similarity.device.type == "cpu" and (weights is None or bool((weights >= 0).all())):
        optional = [None if x is None else x.detach().expand(batch, -1) for x in (weights, start, bonus, barred)]
        each = [
            _lazily(similarity[i].T.contiguous(), keep, *(x if x is None else x[i] for x in optional))
            for i in range(batch)
        ]
        return torch.stack([order for order, _ in each]), torch.stack([gains for _, gains in each])
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


def _lazily(
    columns: Tensor,
    keep: int,
    weights: Tensor | None,
    start: Tensor | None,
    bonus: Tensor | None,
    barred: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`greedy_coverage_gains` of one item: a gain only falls while the cover grows, so that an old one is a bound.

    columns: (N, R). The best bound that is still the best when it is made anew is the largest gain (Minoux's lazy
    greedy). Returns the order of choice and the gains, both (keep,).
    """
    n, rows = columns.shape
    best = columns.new_zeros(rows) if start is None else start.to(columns)

    def gains_of(which: Tensor | slice) -> Tensor:
        gain = (columns[which] - best).clamp_min_(0).sum(-1)
        gain = gain if weights is None else gain * weights[which]
        return gain if bonus is None else gain + bonus[which]

    worth = torch.cat([gains_of(slice(i, i + 256)) for i in range(0, n, 256)])
    free = torch.ones(n, dtype=torch.bool)
    if barred is not None:
        worth = worth.masked_fill(barred, -torch.inf)
    order, gains = torch.empty(keep, dtype=torch.long), torch.empty(keep, dtype=columns.dtype)
    for step in range(keep):
        pick, width, anew = worth.argmax(keepdim=True), 8, set[int]()
        if bool(torch.isneginf(worth[pick])):  # nothing but barred columns is left
            pick = free.to(torch.uint8).argmax(keepdim=True)
            worth[pick] = gains_of(pick)
            anew = {int(pick)}
        while int(pick) not in anew:
            which = torch.cat([pick, worth.topk(min(width, n)).indices])
            which = which[worth[which] > -torch.inf]
            worth[which] = gains_of(which)
            anew.update(which.tolist())
            pick, width = worth.argmax(keepdim=True), 2 * width
        order[step], gains[step] = pick[0], worth[pick[0]]
        best = torch.maximum(best, columns[pick[0]])
        worth[pick], free[pick] = -torch.inf, False
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
