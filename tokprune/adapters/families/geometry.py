"""How grids, tiles and frames are written down as layouts, and how many tiles lie down and across."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families.base import StreamLayout
from tokprune.tokens import Layout

_SIDE = 32


def plain(layout: Layout, note: str = "") -> StreamLayout:
    """A stream without separators whose candidates lie in the order of the rows."""
    n = layout.group.shape[0]
    none = torch.zeros(0, dtype=torch.long)
    return StreamLayout(torch.arange(n), n, layout, none, none, torch.zeros(n, dtype=torch.long), note)


def tiled(
    count: int, grid: tuple[int, int], canvas: tuple[int, int] | None, thumbnail: int | None, note: str = ""
) -> StreamLayout:
    """A stream of `count` tiles of `grid` tokens each, raster inside; `thumbnail` is the position of the whole
    picture's tile."""
    n = grid[0] * grid[1]
    order = list(range(count))
    if thumbnail is not None:
        order.insert(0, order.pop(thumbnail))
    layout = Layout.grid(*grid, count, "tiles", canvas=canvas, thumbnail=thumbnail is not None)
    rows = (torch.tensor(order)[:, None] * n + torch.arange(n)).flatten()
    return replace(plain(layout, note), rows=rows)


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


def canvases(count: int) -> list[tuple[int, int]]:
    """All (down, across) with down * across = count; the squarer ones first, landscape before portrait."""
    shapes = [(down, count // down) for down in range(1, count + 1) if count % down == 0]
    return sorted(shapes, key=lambda shape: (abs(shape[0] - shape[1]), shape[0]))


def canvas_from_pixels(tiles: Tensor, thumbnail: Tensor) -> tuple[tuple[int, int], bool]:
    """The canvas whose tiles, put together and shrunk, look like the thumbnail, and whether that was clear.

    tiles: (k, 3, H, W) in raster order. thumbnail: (3, H, W). Image processors that cut a picture into tiles stretch it
    to the canvas, and to one tile for the thumbnail: both show the same picture. An even picture fits every canvas; the
    squarest is taken then and the answer is marked as unclear.
    """
    shapes = canvases(tiles.shape[0])
    if len(shapes) == 1:
        return shapes[0], True
    small, whole = shrunk(tiles), shrunk(thumbnail)  # (k, 3, s, s), (3, s, s)
    errors = []
    for shape in shapes:
        put = small.unflatten(0, shape).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, down*s, across*s)
        errors.append((F.avg_pool2d(put, shape) - whole).square().mean())
    totals = torch.stack(errors).tolist()
    best = min(range(len(totals)), key=lambda i: (totals[i], i))
    others = min(error for i, error in enumerate(totals) if i != best)
    return shapes[best], totals[best] < 0.5 * others


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) as (..., 3, s, s), small enough to compare; what is that small comes back as it is."""
    side = min(_SIDE, *pictures.shape[-2:])
    return F.adaptive_avg_pool2d(pictures.detach().float(), side)


def canvas_from_shape(count: int, tile: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int]:
    """The canvas whose aspect ratio, with tiles of shape `tile`, is nearest to that of the `whole` picture."""

    def off(shape: tuple[int, int]) -> float:
        ratio = (shape[0] * tile[0] * whole[1]) / (shape[1] * tile[1] * whole[0])
        return max(ratio, 1 / ratio)

    return min(canvases(count), key=off)
