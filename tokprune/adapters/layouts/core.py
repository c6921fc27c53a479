"""What all families of layouts share: the result type, the call they look at, and how plain grids and tiles are written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune.tokens import Layout


class UnknownGeometryError(Exception):
    """A family cannot tell where the tokens of this call lie; the caller falls back to one line and notes the reason."""


@dataclass(frozen=True)
class StreamLayout:
    """Where the rows of one stream lie: an image with all its tiles, or a video.

    rows: (N,) offset of each candidate token within the stream's consecutive run of flattened encoder rows; candidates
    are ordered so that `layout.group` ascends, so rows need not ascend. total: rows of the run, separators included.
    layout: of the N candidates. separators: (S,) offsets of the rows that are never candidates (newline embeddings);
    one is kept iff a candidate of its line is kept: separator_line (S,), line (N,). note: what is not known for sure.
    """

    rows: Tensor
    total: int
    layout: Layout
    separators: Tensor
    separator_line: Tensor
    line: Tensor
    note: str = ""


@dataclass(frozen=True)
class Run:
    """A contiguous run of placeholder tokens of one modality in the prompt.

    length: tokens. sample: row of the batch. before: ids of the other tokens since the run before it in the same sample
    (or since the prompt's start), the last `GAP` of them at most; tags and line breaks there tell tiles from images.
    """

    length: int
    sample: int = 0
    before: tuple[int, ...] = ()


GAP = 32


def placeholder_runs(input_ids: Tensor, mask: Tensor) -> list[Run]:
    """The runs of placeholders of one modality, in (batch, position) order.

    input_ids: (B, L). mask: (B, L) bool, true at the placeholders of that modality. One transfer to the host.
    """
    runs = []
    for sample, (ids, flags) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        edges = [i for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
        end = 0
        for start, stop in zip([0, *edges], [*edges, len(flags)], strict=True):
            if stop > start and flags[start]:
                runs.append(Run(stop - start, sample, tuple(ids[max(end, start - GAP) : start])))
                end = stop
    return runs


@dataclass(frozen=True)
class Call:
    """One call of get_image_features or get_video_features, and what is known about the prompt it belongs to."""

    base: nn.Module
    modality: str
    kwargs: Mapping[str, Any]
    output: Any
    runs: tuple[Run, ...] | None = None
    decode: Callable[[list[int]], str] | None = None

    @property
    def config(self) -> Any:
        """The multimodal model's configuration."""
        return self.base.config

    @property
    def vision_config(self) -> Any:
        """The vision tower's configuration (the whole one where a model has no part of its own for it)."""
        return getattr(self.config, "vision_config", self.config)

    def option(self, name: str) -> Any:
        """A value of the call, or the configuration's where the call leaves it open."""
        value = self.kwargs.get(name)
        return getattr(self.config, name, None) if value is None else value

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each item of the encoder output (an image, a tile, a video: as the model counts)."""
        pooled = self.output.pooler_output
        if isinstance(pooled, Tensor):
            items = 1 if pooled.dim() < 3 else pooled.shape[0]
            return [pooled.numel() // pooled.shape[-1] // max(items, 1)] * items
        return [item.numel() // item.shape[-1] for item in pooled]

    @property
    def total(self) -> int:
        """Rows of the flattened encoder output."""
        return sum(self.lengths)

    @property
    def pixels(self) -> Tensor | None:
        """The pixel values given to the encoder."""
        names = ("pixel_values_videos", "pixel_values") if self.modality == "video" else ("pixel_values",)
        return next((self.kwargs[name] for name in names if isinstance(self.kwargs.get(name), Tensor)), None)

    def rows_of(self, name: str) -> list[list[int]]:
        """A size or grid argument of the call as lists of ints, one per image or video."""
        value = self.kwargs.get(name)
        if value is None:
            raise UnknownGeometryError(f"the call has no {name}")
        return [[int(x) for x in row] for row in (value.tolist() if isinstance(value, Tensor) else value)]


class Family:
    """What is particular to the models of one family: where tokens lie, and how patches of the tower become rows.

    Subclasses override `streams` and `arrange`, and the rest where their tower differs.
    """

    reads_runs: bool = False
    """Whether `streams` needs the prompt's placeholder runs to tell which tiles belong together."""
    told_by_words: bool = False
    """Whether only the words of the prompt tell video frames from pictures."""

    def streams(self, call: Call) -> list[StreamLayout]:
        """One layout per image or video, in the order of the flattened rows."""
        raise UnknownGeometryError("unlisted family")

    def arrange(self, call: Call, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the tower's patches (P, C), special tokens cut, as values of the rows (R, C); separators get `fill`.

        Where a row is made of several patches it gets their mean, or the interpolation that the model itself uses.
        """
        if values.shape[0] != call.total:
            raise UnknownGeometryError(f"{values.shape[0]} patches do not make {call.total} rows")
        return values

    def patches(self, call: Call) -> int | None:
        """Patches per unit of a tower that works on a batch of equal units; None for packed towers without special tokens."""
        return None

    def feature_layers(self, call: Call) -> list[int] | None:
        """Indices of the hidden states that the model selects, as written in its config; None: the tower's last output."""
        layers = call.option("vision_feature_layer")
        if layers is None:
            return None
        return [layers] if isinstance(layers, int) else list(layers)

    def frame_sizes(self, call: Call) -> Tensor | None:
        """(P,) patches of the frame that each patch belongs to, where attention may be confined to windows; else None."""
        return None

    def units(self, call: Call) -> Tensor:
        """The pictures that the tower saw, (U, 3, H, W), in its order."""
        raise UnknownGeometryError("its tower does not take a batch of pictures")


def plain(layout: Layout, note: str = "") -> StreamLayout:
    """A stream without separators whose candidates lie in the order of the rows."""
    n = layout.group.shape[0]
    none = torch.zeros(0, dtype=torch.long)
    return StreamLayout(torch.arange(n), n, layout, none, none, torch.zeros(n, dtype=torch.long), note)


def tiled(
    count: int, grid: tuple[int, int], canvas: tuple[int, int] | None, thumbnail: int | None, note: str = ""
) -> StreamLayout:
    """A stream of `count` tiles of `grid` tokens each, raster inside; `thumbnail` is the position of the whole picture's tile."""
    n = grid[0] * grid[1]
    order = list(range(count))
    if thumbnail is not None:
        order.insert(0, order.pop(thumbnail))
    layout = Layout.grid(*grid, count, "tiles", canvas=canvas, thumbnail=thumbnail is not None)
    stream = plain(layout, note)
    rows = (torch.tensor(order)[:, None] * n + torch.arange(n)).flatten()
    return StreamLayout(rows, count * n, layout, stream.separators, stream.separator_line, stream.line, note)


def mixed_tiles(grids: list[tuple[int, int]], canvas: tuple[int, int]) -> Layout:
    """Layout of a thumbnail, the first of `grids`, and tiles whose grids may differ from it."""
    parts = [Layout.grid(*grid) for grid in grids]
    group = torch.cat([torch.full_like(part.row, i) for i, part in enumerate(parts)])
    row, col = (torch.cat([getattr(part, name) for part in parts]) for name in ("row", "col"))
    return Layout(group, row, col, tuple(grids), "tiles", canvas=canvas, thumbnail=True)


def frames(count: int, grid: tuple[int, int], timestamps: Sequence[float] | None = None) -> Layout:
    """Layout of a video of `count` frames of `grid` tokens."""
    return Layout.grid(*grid, count, "video", timestamps=None if timestamps is None else tuple(timestamps))


def pair(value: Any) -> tuple[int, int]:
    """A size that configs write as one number or as (height, width)."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def scaled_grid(shape: tuple[int, int], n: int) -> tuple[int, int] | None:
    """The grid of `n` tokens with the aspect ratio of `shape` (height, width), or None when there is none."""
    height = round(shape[0] * math.sqrt(n / (shape[0] * shape[1]))) if n > 0 else 0
    if height < 1 or n % height:
        return None
    width = n // height
    # One token of slack per side: pooling rounds odd sides up.
    return (height, width) if abs(width * shape[0] - height * shape[1]) <= max(shape) else None


def pool(values: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Mean over the patches of each token. values: (U, h*w, C) in raster order -> (U, h'*w', C)."""
    if source == target:
        return values
    x = values.transpose(1, 2).unflatten(2, source)  # (U, C, h, w)
    return F.adaptive_avg_pool2d(x, target).flatten(2).transpose(1, 2)
