"""Qwen-VL and its kin: patches of all pictures packed in merge order, described by grid_thw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family
from tokprune.adapters.families.geometry import frames, plain
from tokprune.adapters.families.tiny import (
    MROPE,
    PIXELS,
    WIDTH,
    TinyParts,
    hybrid_language,
    language,
    pixel_range,
    tiny_parts,
    tokenizer,
)
from tokprune.tokens import Layout


@register_family(
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "exaone4_5", "paddleocr_vl")
)
class Packed(Family):
    """Patches of all images one after the other; each merge x merge block of them is consecutive and becomes one token.

    Qwen2.5-VL's tower permutes the blocks into windows; its output is back in raster order, its signals are not.
    """

    tiny_types: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")

    def grids(self, call: EncoderCall) -> list[list[int]]:
        """(frames, height, width) in patches of each image or video."""
        return call.rows_of(f"{call.modality}_grid_thw")

    def merges(self, call: EncoderCall) -> list[int]:
        """Patches along one side of a token's block, for each image or video."""
        grids, total = self.grids(call), call.total
        patches = sum(t * h * w for t, h, w in grids)
        merge = round((patches / max(total, 1)) ** 0.5)
        if patches != total * merge * merge:
            raise UnknownGeometryError(f"{patches} patches do not merge into {total} tokens")
        return [merge] * len(grids)

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        out: list[StreamLayout] = []
        for (t, h, w), merge in zip(self.grids(call), self.merges(call), strict=True):
            grid = (h // merge, w // merge)
            video = call.modality == "video" or t > 1
            out.append(plain(frames(t, grid, self.timestamps(call, len(out), t)) if video else Layout.grid(*grid)))
        return out

    def timestamps(self, call: EncoderCall, index: int, count: int) -> list[float] | None:
        """Seconds of each temporal patch of video `index`, when the call brings the processor's seconds per step
        along."""
        steps = call.kwargs.get("second_per_grid_ts")
        return None if steps is None else [float(steps[index]) * i for i in range(count)]

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        merge = self.merges(call)[0]
        blocks = values.unflatten(0, (-1, merge * merge)).mean(1)  # (tokens, C) in the tower's order
        window = self.window(call)
        return blocks if window is None else blocks[torch.argsort(window).to(blocks.device)]

    def window(self, call: EncoderCall) -> Tensor | None:
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

    def frame_sizes(self, call: EncoderCall) -> Tensor | None:
        if self.window(call) is None:
            return None
        # Windows stay within their frame, so frames keep their place in the tower's order.
        sizes = [(t * h * w, h * w) for t, h, w in self.grids(call)]
        return torch.cat([torch.full((patches,), frame, dtype=torch.float32) for patches, frame in sizes])

    def tiny(self, model_type: str) -> TinyParts:
        import transformers as hf

        text = tokenizer(list(NAMES.values()), named=NAMES)
        ids = {f"{name}_id": text.convert_tokens_to_ids(token) for name, token in NAMES.items()}
        images = hf.Qwen2VLImageProcessor(size=pixel_range(16 * 16, 64 * 64), **PIXELS)
        whole: dict[str, Any] = {"do_sample_frames": False, "cap_pixels_per_frame": False, **PIXELS}
        if model_type.startswith("qwen2"):
            clips = hf.Qwen2VLVideoProcessor(size=pixel_range(16 * 16, 48 * 48), **whole)
            kind = hf.Qwen2VLProcessor if model_type == "qwen2_vl" else hf.Qwen2_5_VLProcessor
            return tiny_parts(self._tiny_model(model_type, ids), kind(images, text, clips), IMAGE, VIDEO)
        # from Qwen3-VL on the size counts all frames, and each frame is a run of its own
        frames_apart = hf.Qwen3VLVideoProcessor(size=pixel_range(2 * 16 * 16, 4 * 48 * 48), **whole)
        processor = hf.Qwen3VLProcessor(images, text, frames_apart)
        return tiny_parts(self._tiny_model(model_type, ids), processor, IMAGE, "<|video_pad|>")

    def _tiny_model(self, model_type: str, ids: dict[str, Any]) -> Any:
        import transformers as hf

        if model_type == "qwen2_vl":
            tower = packed_tower(2, embed_dim=32, hidden_size=WIDTH, mlp_ratio=2)
            text = language("qwen2_vl_text", rope_parameters=dict(MROPE))
            return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=tower, text_config=text, **ids))
        if model_type == "qwen2_5_vl":  # window attention in the tower, features restored to raster order
            tower = packed_tower(3, window_size=16, fullatt_block_indexes=[2])
            text = language("qwen2_5_vl_text", rope_parameters=dict(MROPE))
            return hf.Qwen2_5_VLForConditionalGeneration(
                hf.Qwen2_5_VLConfig(vision_config=tower, text_config=text, **ids)
            )
        if model_type == "qwen3_vl":  # DeepStack planes from two tower blocks
            tower = packed_tower(4, num_position_embeddings=64, deepstack_visual_indexes=[1, 2])
            rope = {**MROPE, "mrope_interleaved": True}
            text = language("qwen3_vl_text", head_dim=16, num_hidden_layers=4, rope_parameters=rope)
            return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(vision_config=tower, text_config=text, **ids))
        tower = packed_tower(2, num_position_embeddings=64)
        config = hf.Qwen3_5Config(vision_config=tower, text_config=hybrid_language(), **ids)
        return hf.Qwen3_5ForConditionalGeneration(config)


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def packed_tower(depth: int, **more: Any) -> dict[str, Any]:
    """Config of a tiny vision tower that reads all pictures as one packed sequence."""
    return {
        "depth": depth,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "num_heads": 4,
        "intermediate_size": 64,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **more,
    }
