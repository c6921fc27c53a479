"""Patches that a connector joins to one token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError


def block_order(side: int, n: int) -> Tensor:
    """(n,) raster numbers of a square grid, block by block of side x side, each in raster order."""
    width = math.isqrt(n)
    if width * width != n or width % side:
        raise UnsupportedModelError(
            f"{n} patches are no square grid of {side} x {side} blocks, which this model's connector joins."
        )
    grid = torch.arange(n).view(width // side, side, width // side, side)
    return grid.transpose(1, 2).reshape(-1)


def blocks(side: int) -> Callable[[int], Tensor] | None:
    """`block_order` for a fixed side; None when each patch stands for itself."""
    return None if side == 1 else functools.partial(block_order, side)
