"""Places of a token stream: pieces of its grids, regions of a thumbnail, groups of equal size as one batch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.ops.blocks import together
from tokprune.tokens import Layout


class Stack(NamedTuple):
    """Groups that one call can treat. where: (G, n) positions in the stream. keep: budget of each. label: what they
    share.
    """

    where: Tensor
    keep: int
    label: Any


def stacks(
    sizes: Sequence[int],
    budgets: Sequence[int],
    device: torch.device | str,
    labels: Sequence[Hashable] | None = None,
) -> list[Stack]:
    """Put groups of equal size, budget and label together, as many as fit into memory with all their pairs; those
    without a budget are left out.

    sizes, budgets, labels: one entry per group; groups lie one after the other in the stream, as Layout demands.
    """
    same: dict[tuple[int, int, Hashable], list[int]] = {}
    start = 0
    for i, (size, keep) in enumerate(zip(sizes, budgets, strict=True)):
        if keep > 0:
            same.setdefault((size, keep, None if labels is None else labels[i]), []).append(start)
        start += size
    return [
        Stack(torch.tensor(part, device=device)[:, None] + torch.arange(size, device=device), keep, label)
        for (size, keep, label), starts in same.items()
        for part in together(starts, size)
    ]


def region_of(row: Tensor, col: Tensor, grid: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """Tile that shows what a thumbnail token shows, in raster order of the canvas.

    row, col: (N,) places in the thumbnail's grid (height, width). canvas: how many tiles lie down and across.
    """
    down = torch.div(row * canvas[0], grid[0], rounding_mode="floor")
    across = torch.div(col * canvas[1], grid[1], rounding_mode="floor")
    return down * canvas[1] + across


def region_sums(values: Tensor, layout: Layout) -> Tensor:
    """Sum of a thumbnail's values over the region of each tile.

    values: (..., N) one per token of the stream, or of several that lie alike; only the thumbnail's (group 0) are read.
    Returns (..., tiles) in float32.
    """
    canvas = check_canvas(layout)
    own, (height, width) = layout.group_slices()[0], layout.grids[0]
    row, col = layout.row[own], layout.col[own]
    if row.device.type != "cpu" and own.stop == height * width:  # a whole grid, in raster order: the host knows it
        row, col = torch.cartesian_prod(torch.arange(height), torch.arange(width)).unbind(1)
    region = region_of(row, col, layout.grids[0], canvas).to(values.device)
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.new_zeros(*values.shape[:-1], canvas[0] * canvas[1]).index_add(-1, region, wide[..., own])


def check_canvas(layout: Layout) -> tuple[int, int]:
    """The canvas of a tiled stream with a thumbnail, or the error that says what is missing."""
    canvas = layout.canvas
    if not layout.thumbnail or canvas is None or canvas[0] * canvas[1] != layout.num_groups - 1:
        raise OptionError(
            f"the layout has {layout.num_groups} groups, thumbnail={layout.thumbnail} and canvas={canvas}; tiles "
            f"with a thumbnail need thumbnail=True and canvas=(down, across) with down * across = groups - 1."
        )
    return canvas


def even_runs(layout: Layout, budgets: Sequence[int]) -> Tensor:
    """Cut each group, in raster order, into budgets[g] runs whose lengths differ by at most one.

    Returns (N,) the number of each token's run, ascending from group to group; -1 in groups without a budget.
    """
    return _cut(layout, budgets, torch.arange(layout.group.shape[0], device=layout.group.device))


def even_cells(layout: Layout, budgets: Sequence[int]) -> Tensor:
    """Cut each group's grid into budgets[g] near-square cells whose token counts differ by at most one.

    The raster is cut into bands, as many as make the cells square, each as high as its number of cells asks for, and
    each band is cut across. So the count is exact for every budget and every shape of hole that unpadding left, and
    where budget and grid divide the cells are the rectangles one would draw by hand.

    Returns (N,) the number of each token's cell; -1 in groups without a budget. The host waits only for streams with
    holes.
    """
    group, device, extents = layout.group, layout.group.device, _extents(layout)
    bands = [min(max(round(math.sqrt(k * h / w)), 1), h, max(k, 1)) for k, (h, w) in zip(budgets, extents, strict=True)]
    cells, high = [max(k, 1) for k in budgets], max(h for h, _ in layout.grids)
    count, across = torch.tensor([cells, bands], device=device)
    run = _cut(layout, cells, torch.arange(group.shape[0], device=device)) - (count.cumsum(0) - count)[group]
    band = torch.div(run * across[group], count[group], rounding_mode="floor")
    walk = ((group * max(bands) + band) * max(w for _, w in layout.grids) + layout.col) * high + layout.row
    return _cut(layout, budgets, torch.sort(walk, stable=True).indices)


def centres(cell: Tensor, k: int, layout: Layout) -> Tensor:
    """The token of each cell that lies nearest to the middle of its cell, ties to the lower index.

    cell: (N,) cell numbers 0 … k-1, or -1. Returns (k,) indices, in the order of the cells.
    """
    n, device = cell.shape[0], cell.device
    inside = cell >= 0
    slot = cell.clamp(min=0)
    size = torch.zeros(k, dtype=torch.long, device=device).index_add(0, slot, inside.long())
    off = torch.zeros(n, dtype=torch.float32, device=device)
    for place in (layout.row, layout.col):
        mean = torch.zeros(k, dtype=torch.long, device=device).index_add(0, slot, place * inside).float() / size
        off = off + (place - mean[slot]) ** 2
    off = off.masked_fill(~inside, torch.inf)
    least = off.new_full((k,), torch.inf).scatter_reduce(0, slot, off, "amin")
    index = torch.where(inside & (off == least[slot]), torch.arange(n, device=device), n)
    return torch.full((k,), n, device=device).scatter_reduce(0, slot, index, "amin")


def middles(cell: Tensor, k: int) -> Tensor:
    """The middle token of each run: the floor of the mean index. cell: (N,) run numbers or -1 -> (k,) indices."""
    n, device = cell.shape[0], cell.device
    slot, index = cell.clamp(min=0), torch.arange(n, device=device)
    first = torch.full((k,), n, device=device).scatter_reduce(0, slot, torch.where(cell >= 0, index, n), "amin")
    last = torch.full((k,), -1, device=device).scatter_reduce(0, slot, torch.where(cell >= 0, index, -1), "amax")
    return torch.div(first + last, 2, rounding_mode="floor")


def _cut(layout: Layout, budgets: Sequence[int], order: Tensor) -> Tensor:
    """Cut each group, walked through in `order`, into equal runs. order: (N,) permutation that keeps groups
    together.
    """
    group, device = layout.group, layout.group.device
    sizes = torch.tensor(layout.group_sizes, device=device)
    count = torch.tensor(list(budgets), device=device)
    rank = torch.arange(group.shape[0], device=device) - (sizes.cumsum(0) - sizes)[group]
    run = (count.cumsum(0) - count)[group] + torch.div(rank * count[group], sizes[group], rounding_mode="floor")
    run = torch.where(count[group] > 0, run, -1)
    return torch.empty_like(run).scatter(0, order, run)


def _extents(layout: Layout) -> list[tuple[int, int]]:
    """Height and width of the box that each group's tokens fill."""
    sizes = layout.group_sizes
    if all(n == h * w for n, (h, w) in zip(sizes, layout.grids, strict=True)):
        return list(layout.grids)
    far = max(max(grid) for grid in layout.grids)
    extents = []
    for place in (layout.row, layout.col):
        low = torch.full((len(sizes),), far, device=place.device).scatter_reduce(0, layout.group, place, "amin")
        high = torch.full((len(sizes),), -1, device=place.device).scatter_reduce(0, layout.group, place, "amax")
        extents.append((high - low + 1).clamp(min=1))
    return [(h, w) for h, w in torch.stack(extents, -1).tolist()]
