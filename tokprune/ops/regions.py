"""Which tile shows what: the parts of the thumbnail that correspond to the tiles of a canvas."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout


def region_of(row: Tensor, col: Tensor, grid: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """Tile that shows what a thumbnail token shows, in raster order of the canvas.

    row, col: (N,) places in the thumbnail's grid (height, width). canvas: how many tiles lie down and across.
    """
    down = torch.div(row * canvas[0], grid[0], rounding_mode="floor")
    across = torch.div(col * canvas[1], grid[1], rounding_mode="floor")
    return down * canvas[1] + across


def region_sums(values: Tensor, layout: Layout) -> Tensor:
    """Sum of a thumbnail's values over the region of each tile.

    values: (N,) one per token of the stream; only the thumbnail's (group 0) are read. Returns (tiles,) in float32.
    """
    canvas = check_canvas(layout)
    own = layout.group_slices()[0]
    region = region_of(layout.row[own], layout.col[own], layout.grids[0], canvas)
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.new_zeros(canvas[0] * canvas[1]).index_add(0, region, wide[own])


def check_canvas(layout: Layout) -> tuple[int, int]:
    """The canvas of a tiled stream with a thumbnail, or the error that says what is missing."""
    canvas = layout.canvas
    if not layout.thumbnail or canvas is None or canvas[0] * canvas[1] != layout.num_groups - 1:
        raise OptionError(
            f"the layout has {layout.num_groups} groups, thumbnail={layout.thumbnail} and canvas={canvas}; tiles with a "
            "thumbnail need thumbnail=True and canvas=(down, across) with down * across = groups - 1."
        )
    return canvas
