"""What would enter a tower's first block if its patches were larger."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Ref


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


@dataclass(frozen=True)
class Embedder:
    """Patches `step` times as large, from a picture made `step` times smaller: (pixels (B, 3, H, W), grid of the full
    picture, step) -> (B, n, C), what would enter the first block."""

    patch: nn.Conv2d
    """The convolution that embeds patches."""
    tower: Ref
    path: str
    """Where in the tower the position embeddings are: an embedding, or a parameter, (n, C) or (1, n, C), or None."""
    skipped: int
    """How many of them belong to tokens that are no patches."""
    after: Callable[[Tensor], Tensor] | None = None
    """Norm before the first block."""

    def __call__(self, pixels: Tensor, grid: tuple[int, int], step: int) -> Tensor:
        x: Tensor = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)
        table: Any = attrgetter(self.path)(self.tower())
        table = table.weight if isinstance(table, nn.Module) else table
        if table is not None:
            place = (table[0] if table.dim() == 3 else table)[self.skipped :]
            x = x + positions(place, grid, step).to(x.dtype)
        return x if self.after is None else self.after(x)
