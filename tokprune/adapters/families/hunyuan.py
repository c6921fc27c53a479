"""HunYuan-VL and Hy V4 VL: packed pictures whose lines end in a newline token, HunYuan's between a begin and an end."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import frames, pool
from tokprune.tokens import Layout


@register_family("hunyuan_vl", "hy_v4_vl")
class HunYuan(Family):
    """Patches in raster order, side x side of them joined by a convolution."""

    def grids(self, call: EncoderCall) -> list[tuple[int, int, int]]:
        """(frames, height, width) in tokens of each picture or clip."""
        side = int(call.vision_config.spatial_merge_size)
        return [(t, h // side, w // side) for t, h, w in call.rows_of(f"{call.modality}_grid_thw")]

    def edge(self, call: EncoderCall) -> int:
        """Tokens that open a picture, and as many that close it."""
        return int(call.config.model_type == "hunyuan_vl")

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        edge, out = self.edge(call), []
        for t, height, width in self.grids(call):
            lines, total = t * height, t * height * (width + 1) + 2 * edge
            start = torch.arange(lines)[:, None] * (width + 1) + edge
            rows, newlines = (start + torch.arange(width)).flatten(), start[:, 0] + width
            separators, at = newlines, torch.arange(lines)
            if edge:
                separators = torch.cat([torch.tensor([0]), newlines, torch.tensor([total - 1])])
                at = torch.cat([at[:1], at, at[-1:]])
            video = call.modality == "video" or t > 1
            layout = frames(t, (height, width)) if video else Layout.grid(height, width)
            line = torch.arange(lines).repeat_interleave(width)
            out.append(StreamLayout(rows, total, layout, separators, at, line))
        return out

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        sources = [(t, h, w) for t, h, w in call.rows_of(f"{call.modality}_grid_thw")]
        if sum(t * h * w for t, h, w in sources) != values.shape[0]:
            raise UnknownGeometryError(f"{values.shape[0]} rows of the tower are not the patches of {sources}")
        parts, out = values.split([t * h * w for t, h, w in sources]), []
        for part, (t, h, w), (_, height, width), stream in zip(
            parts, sources, self.grids(call), self.streams(call), strict=True
        ):
            filled = values.new_full((stream.total, values.shape[1]), fill)
            pooled = pool(part.unflatten(0, (t, h * w)), (h, w), (height, width))  # (t, tokens, C)
            filled[stream.rows.to(values.device)] = pooled.flatten(0, 1)
            out.append(filled)
        return torch.cat(out)
