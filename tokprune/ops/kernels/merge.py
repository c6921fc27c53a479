"""Rows that flow together, summed by one program for each sum: no row waits for another's, and none comes by chance.

The kernel adds what the function of its name in `tokprune.tokens` adds, in the same order.
"""

# Kernels are written in Triton's language: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Columns of one program, 8 a thread."""


@triton.jit
def _term(x, scale, place, n, width, column):
    """A row times its weight, zeros where there is none."""
    there = place < n
    row = tl.load(x + place.to(tl.int64) * width + column, mask=there & (column < width), other=0.0)
    return row, tl.load(scale + place, mask=there, other=0.0)


@triton.jit
def _sums(  # pointers, sizes and switches: a kernel takes no records
    x, target, scale, out, n, keep, width, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    row, item = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x += item * n * width
    target += item * n
    scale += item * n
    kind = out.dtype.element_ty
    total = tl.zeros([COLUMNS], kind)
    for begin in range(0, n, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        left = tl.where(tl.load(target + at, mask=at < n, other=-1) == row, at, n)  # n: flows elsewhere, or done
        first = tl.min(left, 0)
        while first < n:  # four at a time, so that the device has more than one row to fetch
            second = tl.min(tl.where(left > first, left, n), 0)
            third = tl.min(tl.where(left > second, left, n), 0)
            fourth = tl.min(tl.where(left > third, left, n), 0)
            a, by_a = _term(x, scale, first, n, width, column)
            b, by_b = _term(x, scale, second, n, width, column)
            c, by_c = _term(x, scale, third, n, width, column)
            d, by_d = _term(x, scale, fourth, n, width, column)
            total += a.to(kind) * by_a.to(kind)
            total += b.to(kind) * by_b.to(kind)
            total += c.to(kind) * by_c.to(kind)
            total += d.to(kind) * by_d.to(kind)
            left = tl.where(left > fourth, left, n)
            first = tl.min(left, 0)
    tl.store(out + (item * keep + row) * width + column, total, mask=column < width)


def weighted_sums(x: Tensor, target: Tensor, scale: Tensor, k: int) -> Tensor | None:
    """One launch. Each sum looks for its rows among the targets, which is little beside finding these."""
    batch, n, width = x.shape
    if x.requires_grad or scale.requires_grad or not x.is_floating_point():
        return None
    out = torch.empty(
        batch, k, width, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )
    columns = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    chunk = min(1024, max(16, triton.next_power_of_2(n)))
    if out.numel():
        _sums[(k, triton.cdiv(width, columns), batch)](
            x.contiguous(), target.contiguous(), scale.contiguous(), out, n, k, width, COLUMNS=columns, CHUNK=chunk,
            enable_fp_fusion=False,  # rounds as the plain form does
        )  # fmt: skip
    return out
