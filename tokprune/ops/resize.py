"""A grid of tokens resized to any exact number of them, as a sparse linear map; row lengths differ by at most one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

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
