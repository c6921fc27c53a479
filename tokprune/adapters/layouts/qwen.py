"""Families that pack patches in merge order, described by grid_thw: Qwen-VL, GLM-V, VideoLLaMA 3 and their kin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.layouts.core import Call, Family, StreamLayout, UnknownGeometryError, frames, plain
from tokprune.tokens import Layout


class Packed(Family):
    """Patches of all images one after the other; each merge x merge block of them is consecutive and becomes one token.

    Qwen2.5-VL's tower permutes the blocks into windows; its output is back in raster order, its signals are not.
    """

    def grids(self, call: Call) -> list[list[int]]:
        """(frames, height, width) in patches of each image or video."""
        return call.rows_of(f"{call.modality}_grid_thw")

    def merges(self, call: Call) -> list[int]:
        """Patches along one side of a token's block, for each image or video."""
        grids, total = self.grids(call), call.total
        patches = sum(t * h * w for t, h, w in grids)
        merge = round((patches / max(total, 1)) ** 0.5)
        if patches != total * merge * merge:
            raise UnknownGeometryError(f"{patches} patches do not merge into {total} tokens")
        return [merge] * len(grids)

    def streams(self, call: Call) -> list[StreamLayout]:
        out: list[StreamLayout] = []
        for (t, h, w), merge in zip(self.grids(call), self.merges(call), strict=True):
            grid = (h // merge, w // merge)
            video = call.modality == "video" or t > 1
            out.append(plain(frames(t, grid, self.timestamps(call, len(out), t)) if video else Layout.grid(*grid)))
        return out

    def timestamps(self, call: Call, index: int, count: int) -> list[float] | None:
        """Seconds of each temporal patch of video `index`, when the call brings the processor's seconds per step along."""
        steps = call.kwargs.get("second_per_grid_ts")
        return None if steps is None else [float(steps[index]) * i for i in range(count)]

    def arrange(self, call: Call, values: Tensor, fill: float = 0.0) -> Tensor:
        merge = self.merges(call)[0]
        blocks = values.unflatten(0, (-1, merge * merge)).mean(1)  # (tokens, C) in the tower's order
        window = self.window(call)
        return blocks if window is None else blocks[torch.argsort(window).to(blocks.device)]

    def window(self, call: Call) -> Tensor | None:
        """The order in which the tower holds its blocks, or None when it is the raster order."""
        tower: Any = getattr(call.base, "visual", None)
        if not hasattr(tower, "fullatt_block_indexes"):
            return None
        from transformers.vision_utils import get_vision_window_index

        return get_vision_window_index(
            torch.tensor(self.grids(call)),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )[0]

    def frame_sizes(self, call: Call) -> Tensor | None:
        if self.window(call) is None:
            return None
        # Windows stay within their frame, so frames keep their place in the tower's order.
        sizes = [(t * h * w, h * w) for t, h, w in self.grids(call)]
        return torch.cat([torch.full((patches,), float(frame)) for patches, frame in sizes])


class VideoLlama3(Packed):
    """VideoLLaMA 3: every image or video has a merge size of its own; the tower pools its last output by itself."""

    def merges(self, call: Call) -> list[int]:
        sizes = call.kwargs.get(f"{call.modality}_merge_sizes")
        if sizes is None:
            raise UnknownGeometryError(f"the call has no {call.modality}_merge_sizes")
        return [int(m) for m in sizes]

    def arrange(self, call: Call, values: Tensor, fill: float = 0.0) -> Tensor:
        grids, merges = self.grids(call), self.merges(call)
        parts = values.split([t * h * w for t, h, w in grids])
        return torch.cat([part.unflatten(0, (-1, m * m)).mean(1) for part, m in zip(parts, merges, strict=True)])


_PACKED = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm4v_moe",
    "glm46v",
    "glm_ocr",
    "exaone4_5",
    "paddleocr_vl",
)

QWEN: dict[str, Any] = {name: Packed() for name in _PACKED} | {"video_llama_3": VideoLlama3()}
