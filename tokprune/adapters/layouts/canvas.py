"""How many tiles lie down and across: read off the pixels when the call does not say it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SIDE = 32


def canvases(count: int) -> list[tuple[int, int]]:
    """All (down, across) with down * across = count; the squarer ones first, landscape before portrait."""
    found = [(down, count // down) for down in range(1, count + 1) if count % down == 0]
    return sorted(found, key=lambda shape: (abs(shape[0] - shape[1]), shape[0]))


def canvas_from_pixels(tiles: Tensor, thumbnail: Tensor) -> tuple[tuple[int, int], bool]:
    """The canvas whose tiles, put together and shrunk, look like the thumbnail, and whether that was clear.

    tiles: (k, 3, H, W) in raster order. thumbnail: (3, H, W). Image processors that cut a picture into tiles stretch it
    to the canvas, and to one tile for the thumbnail: both show the same picture. An even picture fits every canvas; the
    squarest is taken then and the answer is marked as unclear.
    """
    shapes = canvases(tiles.shape[0])
    if len(shapes) == 1:
        return shapes[0], True
    side = min(_SIDE, *tiles.shape[-2:])
    small = F.adaptive_avg_pool2d(tiles.detach().float(), side)  # (k, 3, s, s)
    whole = F.adaptive_avg_pool2d(thumbnail.detach().float(), side)  # (3, s, s)
    errors = []
    for down, across in shapes:
        put = (
            small.unflatten(0, (down, across)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        )  # (3, down*s, across*s)
        errors.append((F.avg_pool2d(put, (down, across)) - whole).square().mean())
    found = torch.stack(errors).tolist()
    best = min(range(len(found)), key=lambda i: (found[i], i))
    others = min(error for i, error in enumerate(found) if i != best)
    return shapes[best], found[best] < 0.5 * others


def canvas_from_shape(count: int, tile: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int]:
    """The canvas whose aspect ratio, with tiles of shape `tile`, is nearest to that of the `whole` picture."""

    def off(shape: tuple[int, int]) -> float:
        ratio = (shape[0] * tile[0] * whole[1]) / (shape[1] * tile[1] * whole[0])
        return max(ratio, 1 / ratio)

    return min(canvases(count), key=off)
