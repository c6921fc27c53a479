"""Greedy choices as one program per picture: the loop runs on the device, and a batch is one launch.

Each kernel is the loop of the function of its name in `tokprune.ops.select`, whose contract holds here, too. State
lives in registers, up to `LIMIT` tokens; beyond it the wrappers return None, and the caller runs the plain loop.
"""

# Kernels are written in Triton's language: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LIMIT = 32768  # tokens: 1,024 threads hold 32 of each state vector in their registers


def _block(n: int) -> tuple[int, int]:
    """Elements of a state vector (a power of two that holds n), and warps of the program: 8 elements a thread."""
    block = max(16, triton.next_power_of_2(n))
    return block, min(32, max(4, block // 256))


def _fits(x: Tensor, *sizes: int) -> bool:
    return max(sizes) <= LIMIT and x.dtype in (torch.float32, torch.float64)


@triton.jit
def _max_min(distance, first, order, n, keep, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    distance += item * n * n
    order += item * keep
    pick = tl.load(first + item).to(tl.int32)
    nearest = tl.where(inside, float("inf"), -float("inf")).to(distance.dtype.element_ty)
    for step in range(keep):
        tl.store(order + step, pick.to(tl.int64))
        row = tl.load(distance + pick * n + at, mask=inside, other=-float("inf"))
        nearest = tl.where(at == pick, -float("inf"), tl.minimum(nearest, row))
        pick = tl.argmax(nearest, 0)


def greedy_max_min(distance: Tensor, first: Tensor, keep: int) -> Tensor | None:
    """One launch. The distances are read, one row a step; the running minimum stays in registers."""
    batch, n, _ = distance.shape
    if not _fits(distance, n):
        return None
    order = torch.empty(batch, keep, dtype=torch.long, device=distance.device)
    block, warps = _block(n)
    _max_min[(batch,)](distance.contiguous(), first.contiguous(), order, n, keep, BLOCK=block, num_warps=warps)
    return order


@triton.jit
def _map(  # pointers, sizes and switches: a kernel takes no records
    kernel, fallback, factor, order, n, keep, noise, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    kernel += item * n * n
    factor += item * keep * n
    order += item * keep
    own = tl.load(kernel + at * (n + 1), mask=inside, other=0.0)
    worth = tl.load(fallback + item * n + at, mask=inside, other=-float("inf"))
    volume = tl.where(inside, own, -float("inf"))
    for step in range(keep):
        live = volume > own * noise
        some = tl.max(live.to(tl.int32), 0) > 0
        left = tl.where(volume == -float("inf"), -float("inf"), worth)
        pick = tl.argmax(tl.where(some, tl.where(live, volume, -float("inf")), left), 0)
        tl.store(order + step, pick.to(tl.int64))
        known = tl.zeros_like(own)
        for begin in range(0, step, CHUNK):
            k = begin + tl.arange(0, CHUNK)
            of_pick = tl.load(factor + k * n + pick, mask=k < step, other=0.0)
            rows = tl.load(factor + k[:, None] * n + at[None, :], mask=(k < step)[:, None] & inside[None, :], other=0.0)
            known += tl.sum(of_pick[:, None] * rows, 0)
        here = tl.max(tl.where(at == pick, volume, -float("inf")), 0)
        scale = tl.where(some, 1.0 / tl.sqrt(tl.where(some, here, 1.0)), 0.0)
        row = tl.load(kernel + pick * n + at, mask=inside, other=0.0)
        row = tl.where(inside, (row - known) * scale, 0.0)
        tl.store(factor + step * n + at, row, mask=inside)
        volume = tl.where(at == pick, -float("inf"), volume - row * row)
        tl.debug_barrier()  # the next step reads what other threads have just written


def greedy_map(kernel: Tensor, keep: int, fallback: Tensor) -> Tensor | None:
    """One launch. Volumes stay in registers; the rows of the factor pass through the cache of the device."""
    batch, n, _ = kernel.shape
    if not _fits(kernel, n):
        return None
    order = torch.empty(batch, keep, dtype=torch.long, device=kernel.device)
    factor = torch.empty(batch, keep, n, dtype=kernel.dtype, device=kernel.device)
    block, warps = _block(n)
    worth = fallback.to(kernel.dtype).contiguous()
    noise = 100 * torch.finfo(kernel.dtype).eps
    _map[(batch,)](
        kernel.contiguous(), worth, factor, order, n, keep, noise, BLOCK=block, CHUNK=4, num_warps=warps
    )  # fmt: skip
    return order


@triton.jit
def _gain(  # pointers, sizes and switches: a kernel takes no records
    columns, best, weights, bonus, j, rows, ROWS: tl.constexpr, WEIGHTS: tl.constexpr, BONUS: tl.constexpr
):  # fmt: skip
    """What column j adds to the cover `best`, and the column."""
    r = tl.arange(0, ROWS)
    column = tl.load(columns + j * rows + r, mask=r < rows, other=0.0)
    gain = tl.sum(tl.where(r < rows, tl.maximum(column - best, 0.0), 0.0), 0)
    if WEIGHTS:
        gain = gain * tl.load(weights + j)
    if BONUS:
        gain = gain + tl.load(bonus + j)
    return gain, column


@triton.jit
def _cover(start, rows, columns, ROWS: tl.constexpr, START: tl.constexpr):
    """What is covered before the first pick."""
    r = tl.arange(0, ROWS)
    best = tl.zeros([ROWS], columns.dtype.element_ty)
    if START:
        best = tl.load(start + r, mask=r < rows, other=0.0)
    return best


@triton.jit
def _first_gains(  # pointers, sizes and switches: a kernel takes no records
    columns, start, weights, bonus, bounds, rows, n,
    ROWS: tl.constexpr, START: tl.constexpr, WEIGHTS: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    j, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    best = _cover(start + item * rows, rows, columns, ROWS, START)
    columns += item * n * rows
    gain, _ = _gain(columns, best, weights + item * n, bonus + item * n, j, rows, ROWS, WEIGHTS, BONUS)
    tl.store(bounds + item * n + j, gain)


@triton.jit
def _best(bound, last, BARRED: tl.constexpr):
    """The column of the highest bound; -inf is taken, and barred ones come when no other is left, the lowest first."""
    if BARRED:
        free = (bound > -float("inf")) & (last == 0)
        some = tl.max(free.to(tl.int32), 0) > 0
        rest = tl.where(bound > -float("inf"), 0.0, -float("inf"))
        bound = tl.where(some, tl.where(free, bound, -float("inf")), rest)
    return tl.argmax(bound, 0)


@triton.jit
def _coverage(  # pointers, sizes and switches: a kernel takes no records
    columns, start, weights, bonus, barred, bounds, order, gains, rows, n, keep,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    START: tl.constexpr, WEIGHTS: tl.constexpr, BONUS: tl.constexpr, BARRED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    columns += item * n * rows
    weights += item * n
    bonus += item * n
    best = _cover(start + item * rows, rows, columns, ROWS, START)
    bound = tl.load(bounds + item * n + at, mask=at < n, other=-float("inf"))
    last = at * 0
    if BARRED:
        last = tl.load(barred + item * n + at, mask=at < n, other=0).to(tl.int32)
    for step in range(keep):
        pick = _best(bound, last, BARRED)
        seen = pick - pick - 1
        column = best
        gain = tl.sum(best * 0.0, 0)
        while pick != seen:  # a gain only falls: an old one that is still the best when made anew is the best
            seen = pick
            gain, column = _gain(columns, best, weights, bonus, pick, rows, ROWS, WEIGHTS, BONUS)
            bound = tl.where(at == pick, gain, bound)
            pick = _best(bound, last, BARRED)
        tl.store(order + item * keep + step, pick.to(tl.int64))
        tl.store(gains + item * keep + step, gain)
        best = tl.maximum(best, column)
        bound = tl.where(at == pick, -float("inf"), bound)


def greedy_coverage_gains(
    similarity: Tensor,
    keep: int,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    bonus: Tensor | None = None,
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Three launches: columns put in a row, their first gains, and the choice, which evaluates gains lazily."""
    batch, rows, n = similarity.shape
    if not _fits(similarity, rows, n):
        return None
    device, dtype = similarity.device, similarity.dtype
    columns = similarity.detach().mT.contiguous()  # (B, N, R)

    def given(x: Tensor | None) -> Tensor:
        return columns if x is None else x.detach().expand(batch, -1).to(dtype).contiguous()

    bounds = torch.empty(batch, n, dtype=dtype, device=device)
    order = torch.empty(batch, keep, dtype=torch.long, device=device)
    gains = torch.empty(batch, keep, dtype=dtype, device=device)
    block, high = _block(n)[0], _block(rows)[0]
    settings = {"ROWS": high, "START": start is not None, "WEIGHTS": weights is not None, "BONUS": bonus is not None}
    settings["num_warps"] = max(_block(n)[1], _block(rows)[1])  # of both alike, so that both sum in one order
    optional = (given(start), given(weights), given(bonus))
    _first_gains[(n, batch)](columns, *optional, bounds, rows, n, **settings)
    masked = order if barred is None else barred.expand(batch, -1).contiguous().view(torch.uint8)
    _coverage[(batch,)](
        columns, *optional, masked, bounds, order, gains, rows, n, keep, BLOCK=block,
        BARRED=barred is not None, **settings,
    )  # fmt: skip
    return order, gains
