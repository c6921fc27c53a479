"""What brings a frame to its exact share of the tokens: resizing, pooling, thinning out, merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.connector.tome_merge import tome_merge
from tokprune.ops.cells import centres, even_cells
from tokprune.ops.resize import as_rows, line_lengths, resize
from tokprune.ops.separable import (
    column_heights,
    merge_line_published,
    merge_separable,
    merge_separable_published,
)
from tokprune.registry import MethodInfo
from tokprune.tokens import Layout, Merge, Selection, VisualTokens

Mode = Literal["bilinear", "avgpool", "linspace", "tome", "tome_separable"]
MODES = ("bilinear", "avgpool", "linspace", "tome", "tome_separable")
RECTANGULAR = ("bilinear", "avgpool", "tome_separable")


@dataclass(frozen=True)
class FrameReducer(ConnectorMethod):
    """Bring a frame down to `keep` tokens. Not registered: frames methods name it as what they do inside a frame.

    bilinear: the grid resized between its cells. avgpool: means of the cells that each output covers. linspace: tokens
    at even distances along the raster. tome: bipartite merging of the most similar, at most half a round.
    tome_separable: the same within rows, then within columns. All but linspace merge, as linear maps of the tokens. A
    number that forms no rectangle is met by rows (columns for tome_separable) whose lengths differ by one. A frame with
    holes has no grid to resize: the first two average near-square cells of it, tome_separable merges as tome does.

    published: merge by plain means of means, as QuoTA's code does; sizes are counted otherwise.
    """

    mode: Mode = "bilinear"
    published: bool = False

    @property
    def info(self) -> MethodInfo:  # type: ignore[override]
        """Its facts."""
        return MethodInfo(self.mode, f"inside a frame: {self.mode}", complexity="O(ND)", merges=self.mode != "linspace")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Reduce one frame."""
        return self.select_batch([tokens], [keep])[0]

    @torch.no_grad()
    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Reduce frames; those of equal grid and share go in one call."""
        out: dict[int, Selection] = {}
        same: dict[tuple[object, ...], list[int]] = {}
        for i, (tokens, keep) in enumerate(zip(batch, keeps, strict=True)):
            check_keep(keep, len(tokens))
            if tokens.layout.num_groups != 1:
                raise OptionError(
                    f"the reducer {self.mode!r} takes one frame at a time, not {tokens.layout.num_groups}."
                )
            key = (tokens.layout.grids[0], tokens.features.shape, keep, tokens.features.device, tokens.features.dtype)
            if self.mode in ("bilinear", "avgpool") and not _full(tokens.layout):
                out[i] = _cells(tokens, keep)
            else:
                same.setdefault(key, []).append(i)
        for members in same.values():
            frames = [batch[i] for i in members]
            for i, chosen in zip(members, self._reduce(frames, keeps[members[0]]), strict=True):
                out[i] = chosen
        return [out[i] for i in range(len(batch))]

    def _reduce(self, frames: list[VisualTokens], keep: int) -> list[Selection]:
        """Frames of one grid, all to `keep` tokens."""
        n, device, grid = len(frames[0]), frames[0].features.device, frames[0].layout.grids[0]
        if keep == n:
            return [Selection(torch.arange(n, device=device)) for _ in frames]
        if self.mode == "linspace":
            places = [i * (n - 1) // max(keep - 1, 1) for i in range(keep)]
            return [Selection(torch.tensor(places, device=device)) for _ in frames]
        if self.mode in ("bilinear", "avgpool"):
            found = resize(grid, keep, self.mode)
            slots, rows = found.slots.to(device), as_rows(found, n, device)
            return [Selection(slots, Merge(rows=rows)) for _ in frames]
        full = all(_full(frame.layout) for frame in frames)
        features = check_finite(torch.stack([frame.features for frame in frames]), "the visual features")
        lengths = line_lengths(grid, keep)
        separable = self.mode == "tome_separable" and full
        if self.published:
            if separable and len(set(lengths)) == 1:
                _, held = merge_separable_published(features, grid, (len(lengths), lengths[0]))
            else:
                _, held = merge_line_published(features, keep)
            return [_by_shares(shares) for shares in held]
        if separable:
            slots, assign = merge_separable(features, grid, column_heights(grid, lengths))
        else:
            slots, assign = tome_merge(features, keep, share=0.5)
        return [_by_target(*pair) for pair in zip(slots, assign, strict=True)]


def _full(layout: Layout) -> bool:
    """Whether a frame has a token in each cell of its grid."""
    height, width = layout.grids[0]
    return layout.group_sizes[0] == height * width


def _by_target(slots: Tensor, assign: Tensor) -> Selection:
    """Outputs that are the means of what flows into them."""
    size = torch.zeros(len(slots), dtype=torch.float32, device=assign.device).index_add(
        0, assign, torch.ones_like(assign, dtype=torch.float32)
    )
    return Selection(slots, Merge(target=assign, scale=1 / size[assign]))


def _by_shares(held: Tensor) -> Selection:
    """Outputs made of shares of the inputs, (K, N); each sits at its first input, and they follow in that order."""
    slots = (held != 0).int().argmax(-1)
    slots, order = slots.sort()
    return Selection(slots, Merge(rows=held[order]))


def _cells(tokens: VisualTokens, keep: int) -> Selection:
    """Means of near-square cells of a frame with holes."""
    device = tokens.features.device
    layout = tokens.layout.to(device)
    cell = even_cells(layout, [keep])
    slots, order = centres(cell, keep, layout).sort()
    place = torch.empty_like(order).scatter(0, order, torch.arange(keep, device=device))
    return _by_target(slots, place[cell])
