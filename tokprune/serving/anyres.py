"""LLaVA-NeXT and LLaVA-OneVision in vLLM: pictures in tiles, clips pooled.

All newline rows of a picture stay, also those of lines that lost all their tokens: vLLM wants to know their number
before the picture is encoded. (In transformers a newline goes with the last token of its line.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)

from tokprune.adapters.families.base import StreamLayout
from tokprune.serving.llava import Watched
from tokprune.serving.processor import PrunedProcessor, served
from tokprune.serving.tiles import clip, pack, tiles


class Separators(PrunedProcessor):
    """Mixin: newlines of pictures, and the one behind a clip."""

    def separators(self, modality: str, item: int, mm_items: Any) -> int:
        if modality == "video":
            return 1
        size = mm_items["image"].get_image_size(item)
        return len(tiles(self.info.get_hf_config(), (size.height, size.width)).separators)


class PrunedTiles(Watched):
    """Mixin: geometry of pictures from their sizes, and of clips from their frames."""

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        if modality == "image":
            return [tiles(self.config, size) for size in inputs["image_sizes"].tolist()]
        return [clip(self.config, len(pixels)) for pixels in inputs["pixel_values_videos"]]

    def arrange(self, modality: str, inputs: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        if modality == "image":
            parts = values.split([len(pixels) for pixels in inputs["pixel_values"]])
            sizes = inputs["image_sizes"].tolist()
            return [pack(self.config, size, part, 0.0) for size, part in zip(sizes, parts, strict=True)]
        clips = values.split([len(pixels) for pixels in inputs["pixel_values_videos"]])
        return [F.pad(self.apply_pooling(part).flatten(0, 1), (0, 0, 0, 1)) for part in clips]  # type: ignore[attr-defined]


@served(LlavaNextMultiModalProcessor, LlavaNextProcessingInfo, LlavaDummyInputsBuilder, Separators)
class PrunedLlavaNext(PrunedTiles, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-NeXT with fewer visual tokens."""


@served(LlavaOnevisionMultiModalProcessor, LlavaOnevisionProcessingInfo, LlavaOnevisionDummyInputsBuilder, Separators)
class PrunedOneVision(PrunedTiles, LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-OneVision with fewer visual tokens."""
