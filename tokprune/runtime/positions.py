"""Position ids of a pruned sequence, for one-dimensional RoPE and for M-RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.runtime.host import to_device, to_host

if TYPE_CHECKING:
    from tokprune.runtime.plan import Columns


def restarts(positions: Tensor, axes: int = 3) -> Tensor | None:
    """(B, L) bool, where positions start anew inside a row; None where they cannot tell.

    positions: (B, L), or (axes + 1, B, L), whose first row counts the tokens. axes: of the rotary embedding. It is
    transformers' own rule for packed rows: the next position is not one more than the last.
    """
    if positions.ndim == 3:
        if positions.shape[0] != axes + 1:
            return None  # the axes do not tell a picture from a restart, to transformers neither
        positions = positions[0]
    return positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1


def at_start(values: Tensor, samples: Tensor) -> Tensor:
    """`values`, which never fall along a row, as they are where the sample of each column begins. (L,) or (B, L) -> (B,
    L). samples: (B, L), the number of each column's sample.
    """
    first = samples.diff(dim=1, prepend=samples[:, :1] - 1) != 0
    return torch.where(first, values, 0).cummax(1).values


def _since_restart(dropped: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, L) tokens dropped before each column and up to it, in its row or, when given, in its sample."""
    upto = dropped.cumsum(1)
    before = upto - dropped
    if segments is not None:
        base = at_start(before, segments)
        before, upto = before - base, upto - base
    return before, upto


def compact_1d(positions: Tensor, lost: Tensor, shift: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Re-number: each position moves back by the tokens dropped before it in its row.

    positions: (B, L). lost: (B, L) bool, dropped tokens that had a number. shift: (B, 1) move that earlier turns left.
    segments: (B, L) samples of a packed row, each with numbers of its own. All but the positions are on the host.
    Returns the new positions and the moves (B, L + 1): of each column, and the one that later tokens inherit. Works for
    arange and for mask-cumsum conventions alike.
    """
    before, upto = _since_restart(lost.long(), segments)
    moves = shift + torch.cat([before, upto[:, -1:]], 1)
    return positions - to_device(positions.device, moves[:, :-1])[0], moves


def compact_mrope(
    positions: Tensor, keep: Tensor, visual: Tensor, shift: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Re-number M-RoPE: in each visual run every axis by the dense rank of its kept coordinates.

    positions: (3, B, L) time, height, width. keep, visual: (B, L) bool. shift: (B, 1). segments: as in compact_1d. All
    are on the host. What follows a run moves back by how much the larger of its height and width shrank. Returns the
    new positions and the moves (B, L + 1); inside a run they are those of its start.
    """
    positions = positions.clone()
    moves = shift.repeat(1, positions.shape[2] + 1)
    for b in range(positions.shape[1]):
        moved = int(shift[b])
        is_visual, kept_row = visual[b], keep[b]
        cut = is_visual[1:] != is_visual[:-1]
        if segments is not None:
            cut = cut | (segments[b, 1:] != segments[b, :-1])
        starts = [0, *(cut.nonzero().flatten() + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], positions.shape[2]], strict=True):
            if segments is not None and start and segments[b, start] != segments[b, start - 1]:
                moved = 0
            moves[b, start:] = moved
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
            moves[b, end:] = moved
    return positions, moves


def counted(positions: Tensor, visible: Tensor) -> Tensor:
    """(B, L) bool: columns that advance the numbering. A token that the mask hides does so only where positions run on.

    positions: (B, L). visible: (B, L) bool. generate() numbers visible tokens alone; a forward numbers columns.
    """
    running = positions == positions[:, :1] + torch.arange(positions.shape[1], device=positions.device)
    return visible | running


def translate(
    positions: Tensor,
    policy: str,
    keep: Tensor,
    columns: Columns,
    visual: Tensor,
    shift: Tensor,
    axes: int = 3,
) -> tuple[Tensor, Tensor]:
    """Positions of the kept tokens under `policy` ("keep" or "compact"), still at logical columns.

    positions: (B, L), (axes, B, L) or (axes + 1, B, L); a row before those of the `axes` of M-RoPE is text bookkeeping
    that only feeds mask building, so it is always made contiguous. keep: (B, L) bool, among the columns that are
    present. visual: (B, L) bool placeholders. shift: (B, 1). All but the positions are on the host. Returns positions
    of the same shape and the moves (B, L + 1) of each column and of later tokens.
    """
    dropped, segments = columns.present & ~keep, columns.segments  # (B, L) padding is neither kept nor dropped
    hidden = bool((dropped & ~columns.visible).any())  # only of these must the positions be known

    def numbered(positions: Tensor) -> Tensor:
        return counted(to_host(positions)[0], columns.visible) if hidden else columns.visible

    text_row = None
    if positions.ndim == 3 and positions.shape[0] == axes + 1:
        text_row, positions = positions[0], positions[1:]
    if policy == "keep":
        new, moves = positions, shift.expand(-1, positions.shape[-1] + 1)
    elif positions.ndim == 2:
        new, moves = compact_1d(positions, dropped & numbered(positions), shift, segments)
    else:
        new, moves = compact_mrope(to_host(positions)[0], keep, visual, shift, segments)
        new = new.to(positions.device)
    if text_row is not None:
        lost = dropped & numbered(text_row)
        row, _ = compact_1d(text_row, lost, torch.zeros_like(shift), segments)
        new = torch.cat([row[None], new])
    return new, moves
