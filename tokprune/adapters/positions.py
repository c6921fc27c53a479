"""Position ids of a pruned sequence, for one-dimensional RoPE and for M-RoPE."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_1d(positions: Tensor, keep: Tensor, real: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Re-number: each position moves back by the tokens dropped before it in its row.

    positions: (B, L). keep, real: (B, L) bool. shift: (B, 1) move that earlier turns left. Returns the new positions and
    the move that later tokens inherit. Works for arange and for mask-cumsum conventions alike.
    """
    dropped = (real & ~keep).long()
    before = dropped.cumsum(1) - dropped
    return positions - shift - before, shift + dropped.sum(1, keepdim=True)


def compact_mrope(positions: Tensor, keep: Tensor, visual: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Re-number M-RoPE: in each visual run every axis by the dense rank of its kept coordinates.

    positions: (3, B, L) time, height, width. keep, visual: (B, L) bool. shift: (B, 1). What follows a run moves back by how
    much the larger of its height and width shrank. Returns new positions and the accumulated move.
    """
    positions, shift = positions.clone(), shift.clone()
    for b in range(positions.shape[1]):
        moved = int(shift[b])
        is_visual, kept_row = visual[b], keep[b]
        edges = (is_visual[1:] != is_visual[:-1]).nonzero().flatten() + 1
        starts = [0, *edges.tolist()]
        for start, end in zip(starts, [*starts[1:], positions.shape[2]], strict=True):
            if not is_visual[start]:
                positions[:, b, start:end] -= moved
                continue
            run, stay = positions[:, b, start:end].clone(), kept_row[start:end]
            first = int(run.min())
            before, after = 0, 0
            for axis in range(run.shape[0]):
                kept_values = torch.unique(run[axis][stay])
                if axis > 0:
                    before = max(before, torch.unique(run[axis]).numel())
                    after = max(after, kept_values.numel())
                if kept_values.numel():
                    rank = torch.searchsorted(kept_values, run[axis].contiguous()).clamp(max=kept_values.numel() - 1)
                    positions[axis, b, start:end] = first - moved + rank
            moved += before - after
        shift[b] = moved
    return positions, shift


def translate(
    positions: Tensor, policy: str, keep: Tensor, real: Tensor, visual: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Positions of the kept tokens under `policy` ("keep" or "compact"), still at logical columns.

    positions: (B, L), (3, B, L) or (4, B, L); the first of four rows is text bookkeeping that only feeds mask building, so
    it is always made contiguous. Returns positions of the same shape and the move (B, 1) that later tokens inherit.
    """
    text_row = None
    if positions.ndim == 3 and positions.shape[0] == 4:
        text_row, positions = positions[0], positions[1:]
    if policy == "keep":
        new, moved = positions, shift
    elif positions.ndim == 2:
        new, moved = compact_1d(positions, keep, real, shift)
    else:
        new, moved = compact_mrope(positions, keep, visual, shift)
    if text_row is not None:
        row, _ = compact_1d(text_row, keep, real, torch.zeros_like(shift))
        new = torch.cat([row[None], new])
    return new, moved
