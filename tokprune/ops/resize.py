"""A grid of tokens resized to any exact number of them, as a sparse linear map; row lengths differ by at most one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokprune.ops.frame_budget import rectangle

Line = Callable[[int, int, int], list[tuple[int, float]]]


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

    Where `count` is a rectangle that the grid allows (`frame_budget.rectangles`), that one; else rows whose lengths
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
