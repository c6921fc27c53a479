"""What is known while a tower runs: original tokens that each row stands for, and the row of each original token."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from tokprune.adapters.types import ModelCall
from tokprune.errors import OptionError
from tokprune.methods.encoder_base import Cut


@dataclass(frozen=True)
class State:
    """The rows between two blocks, once some were reduced. Packed towers have no dimension B."""

    size: Tensor
    """(B, K, 1) original rows that each row stands for."""
    assign: Tensor
    """(B, N0) row of each original row, or -1."""
    rep: Tensor
    """(B, K) original row at which each row sits, or -1 (padding)."""
    ragged: bool = False
    """Some rows are padding (size 0)."""

    def after(self, before: State | None) -> State:
        """This reduction, of the rows of `before`, as one of the original rows."""
        if before is None:
            return self
        row = torch.where(before.assign >= 0, self.assign.gather(-1, before.assign.clamp(min=0)), -1)
        place = torch.where(self.rep >= 0, before.rep.gather(-1, self.rep.clamp(min=0)), -1)
        return State(self.size, row, place, self.ragged or before.ragged)


@dataclass(eq=False)
class Run:
    """One call of the tower. Dictionaries are by block number and emptied as the run goes."""

    rows: int
    """Rows at the entrance: tokens, or units of the connector."""
    tokens: int
    batch: int
    states: dict[int, State | None] = field(default_factory=dict)
    """Rows that enter each block; None: all of them."""
    seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Outputs of the modules that the block's reader watches."""
    merged: dict[int, Tensor] = field(default_factory=dict)
    """Reduced rows in front of the MLP."""
    branch: dict[int, Tensor] = field(default_factory=dict)
    """What the MLP gave for them."""
    entries: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    """What entered the blocks, while it is alive."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    """What entered the blocks that are cut at their end, for methods that restore the sequence."""
    ropes: dict[int, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)
    """Rotary tables of the rows."""
    table: Tensor | None = None
    """Relative positions, as the attention of the block now running was given them."""
    cut: Cut | None = None
    """Where a method that restores the full sequence left it."""
    counts: list[int] = field(default_factory=list)
    """Rows behind each block."""
    graph: bool = False
    """The run is to be differentiated."""
    trace: EncoderTrace | None = None
    """Known when the last block has run."""
    mask: Tensor | None = None
    """What the attention of the block now running was given."""
    unmasked: bool = False
    """An attention mask was looked at and hides nothing."""
    grid: tuple[int, int] | None = None
    """Height and width of a picture in patches, where the tower shows it."""
    worth: Tensor | None = None
    """(B, units), packed towers (units,) in raster order: by which a pixels method ranked them."""
    listed: frozenset[int] = frozenset()
    """Ids of the hidden states that were brought to full length."""

    def entered(self, index: int) -> int | None:
        """Where the input of block `index` lies in memory, while somebody keeps it."""
        x = self.entries[index]() if index in self.entries else None
        return None if x is None else x.data_ptr()

    def held(self) -> bool:
        """Whether a backward pass may still compute blocks again: the input of some block is kept."""
        return any(x() is not None for x in list(self.entries.values()))


R = TypeVar("R", bound=Run)


@dataclass
class InFlight:
    """What one thread's call of the tower knows."""

    of_owner: bool = False
    """Inside a call of the model that is pruned."""
    run: Run | None = None
    """The tower's run now."""
    last: Run | None = None
    """The last one, for whoever looks at the tower afterwards."""
    recomputed: int = -2
    """Block that a backward pass computes again, with its hooks."""
    whole_block: bool = False
    """The block's own hooks included."""
    grid: tuple[int, int] | None = None
    """Of the picture that the run began with, in patches."""
    pixels: Tensor | None = None
    """That picture; packed towers: the rows of all of them."""
    call: tuple[str, ModelCall] | None = None
    """The pruned model's own call around the tower, for a pixels method: name and arguments."""
    frames: tuple[list[tuple[int, int]], Tensor | None] | None = None
    """Packed towers: height and width of each frame in units, and the units' order."""
    clips: list[tuple[int, int, int]] = field(default_factory=list)
    """Packed towers, for a pixels method: frames, height and width of each picture or clip in units."""


@dataclass(frozen=True)
class EncoderTrace:
    """What the last run of a tower left. Packed towers: one dimension over all images."""

    assign: Tensor
    """(images, patches) group of each patch in the tower's order, -1 when it was dropped: what a merge map draws."""
    survivor: Tensor
    """(images, patches) True at the one patch of each group where the group's token sits."""
    size: Tensor
    """(images, groups) patches in each group, 0 for padding."""
    fold: int
    """Patches that share a place in all of these (units of the connector)."""
    prefix: int
    counts: tuple[int, ...]
    """Tokens (or units) that left each block, prefix included."""
    cells: tuple[tuple[int, int], ...] = ()
    """Height and width of each image or frame in places."""
    worth: Tensor | None = None
    """(images, places) by which a pixels method ranked them; None where there is none."""

    def merge_map(self, image: int = 0) -> Tensor:
        """Group of each place of one image (packed: frame) on its grid, (height, width); -1 where it was dropped."""
        if not 0 <= image < len(self.cells):
            raise OptionError(
                f"image {image} is not among the {len(self.cells)} of the last run (0 to {len(self.cells) - 1})."
            )
        height, width = self.cells[image]
        if self.assign.ndim == 2:
            return self.assign[image].view(height, width)
        start = sum(h * w for h, w in self.cells[:image])
        return self.assign[start : start + height * width].view(height, width)
