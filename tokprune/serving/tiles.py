"""Where the rows of LLaVA-NeXT and LLaVA-OneVision lie: a thumbnail, unpadded tiles, newlines; clips pooled.

vLLM has no function for it that a model could be asked for, so it is worked out from the config and the picture's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import frames
from tokprune.adapters.families.llava_next import canvas_of, traced_layout


def pack(config: Any, size: Sequence[int], values: Tensor, fill: float) -> Tensor:
    """Values of a picture's patches in the order of its rows, newlines `fill`. -> (R, C).

    size: (height, width) of the picture as it came. values: (1 + tiles, patches, C), the thumbnail first.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side = side_of(config)
    down, across = canvas_of(size, config.image_grid_pinpoints, config.vision_config.image_size)
    cut = values[1 : 1 + down * across].unflatten(0, (down, across)).unflatten(2, (side, side))
    whole = cut.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (C, H, W)
    whole = unpad_image(whole, tuple(size))
    limit = getattr(config, "vision_aspect_ratio", "")
    if limit.startswith("anyres_max_"):  # LLaVA-OneVision shrinks what is larger
        height, width = whole.shape[1:]
        ratio = math.sqrt(height * width / (int(limit.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            whole = F.interpolate(whole[None], [int(height // ratio), int(width // ratio)], mode="bilinear")[0]
    return torch.cat([values[0], F.pad(whole, (0, 1), value=fill).flatten(1).T])


def side_of(config: Any) -> int:
    """Patches along one side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tiles(config: Any, size: Sequence[int]) -> StreamLayout:
    """Where the rows of a picture lie. size: (height, width) of the picture as it came."""
    side = side_of(config)
    canvas = canvas_of(size, config.image_grid_pinpoints, config.vision_config.image_size)
    count = 1 + canvas[0] * canvas[1]
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    cell = torch.stack([torch.ones_like(y), y, x], -1).flatten(0, 1).float()  # (patches, 3): in a tile, y, x
    tile = torch.arange(count - 1)
    corner = torch.stack([torch.zeros_like(tile), tile // canvas[1] * side, tile % canvas[1] * side], -1).float()
    thumbnail = cell * torch.tensor([0.0, 1.0, 1.0])
    places = torch.cat([thumbnail[None], cell + corner[:, None]])
    return traced_layout(pack(config, size, places, torch.nan), side, count, canvas)


def clip(config: Any, count: int) -> StreamLayout:
    """Where the rows of a clip of `count` frames lie: pooled by two, one newline at the end."""
    side = (side_of(config) + 1) // 2
    n = count * side * side
    end, zero = torch.tensor([n]), torch.zeros(1, dtype=torch.long)
    line = torch.zeros(n, dtype=torch.long)
    return StreamLayout(torch.arange(n), n + 1, frames(count, (side, side)), end, zero, line)
