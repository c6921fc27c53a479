"""What would enter a tower's first block if its patches were larger."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor, nn

Embed = Callable[[Tensor, tuple[int, int], int], Tensor]


def positions(table: Tensor, grid: tuple[int, int], step: int) -> Tensor:
    """Position embeddings (n, C) of a grid, resampled to patches `step` times as large. -> (1, m, C).

    Bicubically and with antialiasing, as APT's models do and timm by default.
    table: of a square grid when its size is not that of `grid` (models that resample it themselves).
    """
    n = table.shape[0]
    old = grid if grid[0] * grid[1] == n else (math.isqrt(n), math.isqrt(n))
    new = (grid[0] // step, grid[1] // step)
    if old != grid:  # pictures of another size: first what the model itself makes of it
        table = _resample(table, old, grid, antialias=False)
    whole = table.view(*grid, -1)[: new[0] * step, : new[1] * step].reshape(-1, table.shape[1])
    return _resample(whole, (new[0] * step, new[1] * step), new, antialias=True)[None]


def _resample(table: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool) -> Tensor:
    x = table.float().view(1, *old, -1).permute(0, 3, 1, 2)
    x = nn.functional.interpolate(x, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return x.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def embedder(
    patch: nn.Module, table: Callable[[], Tensor | None], after: Callable[[Tensor], Tensor] | None = None
) -> Embed:
    """patch: the convolution. table: position embeddings of the patches, (n, C). after: norm before the first block."""
    return functools.partial(_embed, patch, table, after)


def _embed(
    patch: nn.Module,
    table: Callable[[], Tensor | None],
    after: Callable[[Tensor], Tensor] | None,
    pixels: Tensor,
    grid: tuple[int, int],
    step: int,
) -> Tensor:
    weight = next(patch.parameters())
    x = patch(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
    place = table()
    x = x if place is None else x + positions(place, grid, step).to(x.dtype)
    return x if after is None else after(x)
