"""InternVL in vLLM (checkpoints in the format of transformers): tiles with a thumbnail last; clips frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.transformers_utils.processor import cached_processor_from_config

from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import canvas_from_pixels, frames, plain, pool, tiled
from tokprune.serving.choose import Kept
from tokprune.serving.model import Pruned
from tokprune.serving.processor import served
from tokprune.serving.signals import TowerSignals
from tokprune.serving.weave import woven
from tokprune.tokens import Layout


@served(InternS1MultiModalProcessor, InternS1ProcessingInfo, InternS1DummyInputsBuilder, weaves=("video",))
class PrunedInternVL(Pruned, InternS1ForConditionalGeneration):  # type: ignore[misc]
    """InternVL with fewer visual tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tokprune_words = cached_processor_from_config(vllm_config.model_config)
        blocks, depth = self.vision_tower.encoder.layer, self.config.vision_config.num_hidden_layers
        self.tokprune_signals = TowerSignals(self.tokprune.method.needs, blocks, depth, cls=True)
        self.tokprune_signals.watch_output(self.vision_tower)

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        side = math.isqrt(self.num_image_token)
        if modality == "video":
            return [plain(frames(int(count), (side, side))) for count in inputs["video_num_patches"].flatten().tolist()]
        counts = [int(count) for count in inputs["image_num_patches"].flatten().tolist()]
        pictures = inputs["pixel_values"].split(counts)
        return [_picture(pixels, (side, side)) for pixels in pictures]

    def read(self, modality: str, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        vision = self.config.vision_config
        grid = (vision.image_size[0] // vision.patch_size[0], vision.image_size[1] // vision.patch_size[1])
        joined = round(1 / self.config.downsample_ratio)
        counts = inputs[f"{modality}_num_patches"].flatten().tolist()
        out = {}
        for name, values in self.tokprune_signals.take(grid[0] * grid[1]).items():
            flat = values.flatten(2) if values.dim() > 2 else values[..., None]  # (U, patches, C)
            pooled = pool(flat, grid, (grid[0] // joined, grid[1] // joined))
            rows = [part.flatten(0, 1) for part in pooled.split([int(n) for n in counts])]
            out[name] = [x.reshape(x.shape[0], *values.shape[2:]) for x in rows]
        return out

    def placed(
        self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor], kept: Sequence[Kept | None]
    ) -> Any:
        if modality == "image":
            return super().placed(modality, inputs, features, kept)
        out = []
        counts = inputs["video_num_patches"].flatten().tolist()
        for rows, k, count in zip(features, kept, counts, strict=True):
            ids = self._words(int(count))
            out.append(rows if k is None else woven(ids, self._video_token, k, self.language_model.embed_input_ids))
        return out

    @property
    def _video_token(self) -> int:
        words = self.tokprune_words
        return int(words.tokenizer.convert_tokens_to_ids(words.video_token))

    def _words(self, count: int) -> list[int]:
        """Token ids that stand for a clip of `count` frames before pruning, as vLLM's processor writes it."""
        words = self.tokprune_words
        frame = words.start_image_token + words.video_token * words.image_seq_length + words.end_image_token
        text = "\n".join(f"Frame{i + 1}: {frame}" for i in range(count))
        ids: list[int] = words.tokenizer.encode(text, add_special_tokens=False)
        return ids


def _picture(pixels: Tensor, grid: tuple[int, int]) -> StreamLayout:
    """Where the rows of a picture lie. pixels: (tiles, 3, H, W), the thumbnail last where there are several."""
    count = pixels.shape[0]
    if count == 1:
        return plain(Layout.grid(*grid))
    canvas, _ = canvas_from_pixels(pixels[:-1], pixels[-1])
    return tiled(count, grid, canvas, count - 1)
