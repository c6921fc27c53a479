"""Molmo2: a small picture and the whole one in full resolution, pooled from overlapping crops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokprune.adapters.layouts.core import Call, Family, StreamLayout, frames, mixed_tiles, plain
from tokprune.tokens import Layout


class Molmo2(Family):
    """The call says which patches each token pools, so crops and their overlaps need no unravelling. The full-resolution
    picture is one tile of its own grid; the small one is the thumbnail."""

    def grids(self, call: Call) -> list[list[int]]:
        """(low height, low width, height, width) of each image, (frames, height, width) of each video."""
        return call.rows_of(f"{call.modality}_grids")

    def streams(self, call: Call) -> list[StreamLayout]:
        if call.modality == "video":
            return [plain(frames(t, (h, w))) for t, h, w in self.grids(call)]
        out = []
        for a, b, c, d in self.grids(call):
            out.append(plain(mixed_tiles([(a, b), (c, d)], (1, 1)) if a * b else Layout.grid(c, d)))
        return out

    def arrange(self, call: Call, values: Tensor, fill: float = 0.0) -> Tensor:
        pooling: Tensor = call.kwargs[f"{call.modality}_token_pooling"].to(values.device)  # (rows, patches), -1: none
        used = pooling >= 0
        total = (values[pooling.clamp(min=0)] * used[..., None]).sum(1)
        mean = total / used.sum(1, keepdim=True).clamp(min=1)
        return mean[used.any(1)]

    def patches(self, call: Call) -> int | None:
        return None if call.pixels is None else call.pixels.shape[-2]

    def feature_layers(self, call: Call) -> list[int] | None:
        # Molmo2 counts blocks from 0; hidden state i + 1 is the output of block i.
        return [i + 1 if i >= 0 else i for i in call.config.adapter_config.vision_feature_layer]


MOLMO: dict[str, Any] = {"molmo2": Molmo2()}
