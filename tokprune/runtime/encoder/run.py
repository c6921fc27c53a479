"""What is known while a tower runs: how many original tokens each row stands for, and which row each original token
is in.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.encoder_base import Cut


@dataclass(frozen=True)
class State:
    """The rows between two blocks. All None before the first reduction.

    Batched towers: size (B, K, 1), assign (B, N0) row of each original row or -1, rep (B, K) original row at which each
    row sits or -1 (padding). Packed towers: the same without B. ragged: some rows are padding (size 0). detour: the
    method brings the full sequence back.
    """

    size: Tensor | None = None
    assign: Tensor | None = None
    rep: Tensor | None = None
    ragged: bool = False
    detour: bool = False

    def then(self, rep: Tensor, assign: Tensor, size: Tensor, ragged: bool, detour: bool = False) -> State:
        """The state after a reduction of these rows. rep: (..., K), assign: (..., N), size: (..., K, 1)."""
        if self.assign is None or self.rep is None:
            return State(size, assign, rep, ragged, detour)
        row = torch.where(self.assign >= 0, assign.gather(-1, self.assign.clamp(min=0)), -1)
        place = torch.where(rep >= 0, self.rep.gather(-1, rep.clamp(min=0)), -1)
        return State(size, row, place, ragged, detour)


@dataclass(eq=False)
class Run:
    """One call of the tower. states[i]: rows that enter block i. The dictionaries are per block number and emptied
    as it goes. inputs: what entered the blocks that are cut at their end. ropes: rotary tables of the rows that enter
    each block. entries: what entered the blocks, while it is alive. graph: the run is to be differentiated. cuts: where a method that restores the full sequence left it (packed towers: one per size of frames, with
    the places of the frames' units). trace: known when the last block has run. unmasked: an attention mask was looked at and hides
    nothing. grid: height and width of a picture in patches, where the tower shows it.
    """

    rows: int
    tokens: int
    batch: int
    states: dict[int, State] = field(default_factory=dict)
    seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    merged: dict[int, Tensor] = field(default_factory=dict)
    branch: dict[int, Tensor] = field(default_factory=dict)
    entries: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    ropes: dict[int, Tensor] = field(default_factory=dict)
    cuts: list[tuple[Tensor | None, Cut]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    graph: bool = False
    trace: EncoderTrace | None = None
    unmasked: bool = False
    grid: tuple[int, int] | None = None

    def entered(self, index: int) -> int | None:
        """Where the input of block `index` lies in memory, while somebody keeps it."""
        x = self.entries[index]() if index in self.entries else None
        return None if x is None else x.data_ptr()

    def held(self) -> bool:
        """Whether a backward pass may still compute blocks again: the input of some block is kept."""
        return any(x() is not None for x in list(self.entries.values()))


@dataclass(frozen=True)
class EncoderTrace:
    """The last run of a tower.

    assign: (images, patches) group number of each patch, in the tower's patch order, -1 when it was dropped: what a
    merge map draws. survivor: (images, patches) True at the one patch of each group where the group's token sits. size:
    (images, groups) patches in each group, 0 for padding. Packed towers: one dimension over all images. fold: patches
    that share a place in all of these (units of the connector). counts: tokens (or units) that left each block, prefix
    included. cells: height and width of each image or frame in places.
    """

    assign: Tensor
    survivor: Tensor
    size: Tensor
    fold: int
    prefix: int
    counts: tuple[int, ...]
    cells: tuple[tuple[int, int], ...] = ()

    def merge_map(self, image: int = 0) -> Tensor:
        """Group of each place of one image (packed towers: of one frame) on its grid, (height, width); -1 where it
        was dropped.
        """
        if not 0 <= image < len(self.cells):
            raise OptionError(
                f"image {image} is not among the {len(self.cells)} of the last run (0 to {len(self.cells) - 1})."
            )
        height, width = self.cells[image]
        if self.assign.ndim == 2:
            return self.assign[image].view(height, width)
        start = sum(h * w for h, w in self.cells[:image])
        return self.assign[start : start + height * width].view(height, width)
