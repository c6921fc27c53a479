"""Inkling 2: packed pictures, a [CLS] token in front of each, whose grids count tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import frames, plain
from tokprune.tokens import Layout


@register_family("inkling2", "inkling2_loop")
class Inkling2(Family):
    """The patches of a token follow each other."""

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        grids = call.rows_of("image_grid_thw")
        return [plain(frames(t, (h, w)) if t > 1 else Layout.grid(h, w)) for t, h, w in grids]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        merge = int(call.vision_config.spatial_merge_size) ** 2
        patches = [t * h * w * merge + 1 for t, h, w in call.rows_of("image_grid_thw")]
        if sum(patches) != values.shape[0]:
            raise UnknownGeometryError(
                f"{values.shape[0]} rows of the tower are not its {sum(patches)} patches and [CLS]"
            )
        return torch.cat([part[1:].unflatten(0, (-1, merge)).mean(1) for part in values.split(patches)])
