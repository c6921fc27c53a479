"""What brings a frame to its exact share of the tokens: resizing, pooling, thinning out, merging."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.connector.tome_merge import tome_merge
from tokprune.ops.grid import centres, even_cells
from tokprune.ops.merge import bipartite_matching, cap, means, merge, merged_to
from tokprune.ops.numeric import wide
from tokprune.registry import MethodInfo
from tokprune.tokens import Layout, Merge, Selection, VisualTokens

Line = Callable[[int, int, int], list[tuple[int, float]]]


@lru_cache(maxsize=256)
def rectangles(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The sizes to which a grid may be resized: at most as high and as wide, and no more than twice as slim or as flat.

    One for each number of tokens, the one whose form is nearest to the grid's (taller where two are). Ascending, as (h,
    w).
    """
    best: dict[int, tuple[float, int, int]] = {}
    for h in range(1, height + 1):
        for w in range(1, width + 1):
            tall, flat = h * width, w * height  # tall / flat = (h / w) / (height / width)
            if max(tall, flat) <= 2 * min(tall, flat):
                # Fractions a/b ≥ 1 compare exactly as floats of a few thousand do; taller (-h) wins among equals.
                key = (max(tall, flat) / min(tall, flat), -h, w)
                best[h * w] = min(best.get(h * w, key), key)
    return tuple((-h, w) for _, (_, h, w) in sorted(best.items()))


def rectangle(grid: tuple[int, int], count: int) -> tuple[int, int] | None:
    """The rectangle of exactly `count` tokens to which a grid may be resized, or None if there is none."""
    return next((s for s in rectangles(*grid) if s[0] * s[1] == count), None)


class Resize(NamedTuple):
    """out[k] = sum of value * x[column] over the entries of row k.

    slots: (K,) ascending cells at which the outputs sit, nearest to their centres. row, column, value: (E,) the
    entries.
    """

    slots: Tensor
    row: Tensor
    column: Tensor
    value: Tensor


def line_lengths(grid: tuple[int, int], count: int) -> list[int]:
    """Tokens of each row when a grid is resized to `count` of them.

    Where `count` is a rectangle that the grid allows (`rectangles`), that one; else rows whose lengths
    differ by one, as many as keep the cells' form. Never more or longer rows than the grid has.
    """
    height, width = grid
    shape = rectangle(grid, count)
    if shape is not None:
        return [shape[1]] * shape[0]
    rows = min(max(round(math.sqrt(count * height / width)), -(-count // width)), height, count)
    return [(i + 1) * count // rows - i * count // rows for i in range(rows)]


def interpolated(size: int, count: int, i: int) -> list[tuple[int, float]]:
    """Where output `i` of `count` along a line of `size` cells comes from: its two neighbours (pixel centres)."""
    place = max((i + 0.5) * size / count - 0.5, 0.0)
    low = min(int(place), size - 1)
    high, share = min(low + 1, size - 1), place - low
    return [(low, 1.0)] if share <= 0 or high == low else [(low, 1 - share), (high, share)]


def averaged(size: int, count: int, i: int) -> list[tuple[int, float]]:
    """Where output `i` of `count` along a line of `size` cells comes from: all cells it touches, alike."""
    low, high = i * size // count, -(-(i + 1) * size // count)
    return [(cell, 1 / (high - low)) for cell in range(low, high)]


LINES: dict[str, Line] = {"bilinear": interpolated, "avgpool": averaged}


@lru_cache(maxsize=512)
def resize(grid: tuple[int, int], count: int, mode: str) -> Resize:
    """The linear map that resizes a full grid (height, width) to `count` tokens. mode: a name in LINES.

    For a rectangle it is what `interpolate(mode="bilinear", align_corners=False)` and `adaptive_avg_pool2d` compute.
    """
    height, width = grid
    line, lengths = LINES[mode], line_lengths(grid, count)
    slots: list[int] = []
    row: list[int] = []
    column: list[int] = []
    value: list[float] = []
    for j, length in enumerate(lengths):
        down = line(height, len(lengths), j)
        middle = (2 * j + 1) * height // (2 * len(lengths))
        for i in range(length):
            cells = [(y * width + x, a * b) for y, a in down for x, b in line(width, length, i)]
            row += [len(slots)] * len(cells)
            column += [cell for cell, _ in cells]
            value += [weight for _, weight in cells]
            slots.append(middle * width + (2 * i + 1) * width // (2 * length))
    return Resize(
        torch.tensor(slots), torch.tensor(row), torch.tensor(column), torch.tensor(value, dtype=torch.float32)
    )


def as_rows(found: Resize, inputs: int, device: torch.device) -> Tensor:
    """The map as sparse rows, (K, inputs)."""
    places = torch.stack([found.row, found.column]).to(device)
    size = (len(found.slots), inputs)
    return torch.sparse_coo_tensor(places, found.value.to(device), size, is_coalesced=True, check_invariants=False)


def column_heights(grid: tuple[int, int], lengths: list[int]) -> list[int]:
    """Heights of the columns that hold as many tokens as rows of these lengths do; they differ by at most one."""
    count, columns = sum(lengths), min(max(lengths), grid[1])
    return [(i + 1) * count // columns - i * count // columns for i in range(columns)]


@torch.no_grad()
def merge_separable(features: Tensor, grid: tuple[int, int], heights: list[int]) -> tuple[Tensor, Tensor]:
    """Merge every row of the grid to len(heights) tokens, then column j of those to heights[j].

    features: (B, H * W, C). Returns the cells (B, K) at which the outputs sit, ascending, and (B, H * W) the output
    into which each cell flows; an output is the mean of its cells.
    """
    batch, (height, width), columns = features.shape[0], grid, len(heights)
    x, size, rep, to_column = merged_to(features.reshape(batch * height, width, -1), columns)
    # (B * columns, H, C): what was row by row becomes column by column.
    x = x.unflatten(0, (batch, height)).transpose(1, 2)
    size = size.unflatten(0, (batch, height)).transpose(1, 2)
    rep, to_column = (y.unflatten(0, (batch, height)) for y in (rep, to_column))  # (B, H, columns), (B, H, W)
    cells, start = [], 0
    row_slot = rep.new_empty(batch, columns, height)  # output of each row's token, by column
    for j, tall in enumerate(heights):
        _, _, rows, assign = merged_to(x[:, j], tall, size=size[:, j])  # (B, tall), (B, H)
        cells.append(rows * width + rep[:, :, j].gather(1, rows))
        row_slot[:, j] = assign + start
        start += tall
    slots = torch.cat(cells, 1)  # (B, K) by column
    slots, order = slots.sort(-1)
    place = torch.empty_like(order).scatter(1, order, torch.arange(start, device=x.device).expand_as(order))
    outputs = row_slot.transpose(1, 2).gather(2, to_column).flatten(1)  # (B, H * W)
    return slots, place.gather(1, outputs)


@torch.no_grad()
def merge_line_published(features: Tensor, keep: int, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`merged_to` as QuoTA's code has it: every round takes plain means, however many originals the merged ones hold.

    features: (B, N, C). held: (B, N, M) shares of M originals in each, or None for the inputs themselves. Returns what
    is left, (B, keep, C) in ToMe's order, and the shares (B, keep, M).
    """
    x = wide(features)
    if held is None:
        held = torch.eye(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], -1, -1)
    while x.shape[1] > keep:
        matching = bipartite_matching(x, min(x.shape[1] - keep, max(1, cap(x.shape[1]))))
        x, held = merge(matching, x), merge(matching, held)
    return x, held


@torch.no_grad()
def merge_separable_published(features: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`merge_separable` to a rectangle as QuoTA's code has it.

    Returns (B, h * w, C) and the shares (B, h * w, H * W).
    """
    batch, (height, width), (h, w) = features.shape[0], grid, shape
    eye = torch.eye(height * width, dtype=torch.float32, device=features.device).reshape(height, width, -1)
    held = eye.to(wide(features).dtype).expand(batch, -1, -1, -1).flatten(0, 1)
    x, held = merge_line_published(features.reshape(batch * height, width, -1), w, held)  # (B * H, w, ·)
    x, held = (y.unflatten(0, (batch, height)).transpose(1, 2).flatten(0, 1) for y in (x, held))  # (B * w, H, ·)
    x, held = merge_line_published(x, h, held)
    x, held = (y.unflatten(0, (batch, w)).transpose(1, 2).flatten(1, 2) for y in (x, held))
    return x, held


Mode = Literal["bilinear", "avgpool", "linspace", "tome", "tome_separable"]
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
        return [means(*pair) for pair in zip(slots, assign, strict=True)]


def _full(layout: Layout) -> bool:
    """Whether a frame has a token in each cell of its grid."""
    height, width = layout.grids[0]
    return layout.group_sizes[0] == height * width


def _by_shares(held: Tensor) -> Selection:
    """Outputs made of shares of the inputs, (K, N); each sits at its first input, and they follow in that order."""
    slots = (held != 0).int().argmax(-1)
    slots, order = slots.sort()
    return Selection(slots, Merge(rows=held[order]))


def _cells(tokens: VisualTokens, keep: int) -> Selection:
    """Means of near-square cells of a frame with holes."""
    layout = tokens.layout.to(tokens.features.device)
    cell = even_cells(layout, [keep])
    return means(centres(cell, keep, layout), cell)
