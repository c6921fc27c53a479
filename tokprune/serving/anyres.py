"""LLaVA-NeXT and LLaVA-OneVision in vLLM: a thumbnail, tiles without their padding, newline rows; clips pooled.

All newline rows of a picture stay, also those of lines that lost all their tokens: vLLM wants to know their number before
the picture is encoded. (In transformers a newline goes with the last token of its line.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import frames
from tokprune.adapters.families.llava_next import canvas_of, traced_layout
from tokprune.serving.model import Pruned
from tokprune.serving.processor import PrunedInfo, PrunedProcessor


def tiles(config: Any, size: Sequence[int]) -> StreamLayout:
    """Where the rows of a picture lie. size: (height, width) of the picture as it came."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    canvas = canvas_of(size, config.image_grid_pinpoints, tile)
    y, x = torch.meshgrid(
        torch.arange(canvas[0] * side, dtype=torch.float32),
        torch.arange(canvas[1] * side, dtype=torch.float32),
        indexing="ij",
    )
    places = unpad_image(torch.stack([torch.ones_like(y), y, x]), tuple(size))  # (3, H, W): in a tile, y, x
    limit = getattr(config, "vision_aspect_ratio", "")
    if limit.startswith("anyres_max_"):
        height, width = places.shape[1:]
        ratio = math.sqrt(height * width / (int(limit.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            shrunk = [int(height // ratio), int(width // ratio)]
            places = F.interpolate(places[None], shrunk, mode="bilinear")[0]
    places = F.pad(places, (0, 1), value=torch.nan).flatten(1).T  # each line closed by a newline
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    thumbnail = torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1).float()
    return traced_layout(torch.cat([thumbnail, places]), side, 1 + canvas[0] * canvas[1], canvas)


class TilesInfo(PrunedInfo, LlavaNextProcessingInfo):  # type: ignore[misc]
    pass


class OneVisionInfo(PrunedInfo, LlavaOnevisionProcessingInfo):  # type: ignore[misc]
    pass


class Separators(PrunedProcessor):
    """Mixin: newlines of pictures, and the one behind a clip."""

    def separators(self, modality: str, item: int, mm_items: Any) -> int:
        if modality == "video":
            return 1
        size = mm_items["image"].get_image_size(item)
        return len(tiles(self.info.get_hf_config(), (size.height, size.width)).separators)


class TilesProcessor(Separators, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    pass


class OneVisionProcessor(Separators, LlavaOnevisionMultiModalProcessor):  # type: ignore[misc]
    pass


class PrunedTiles(Pruned):
    """Mixin: geometry of pictures from their sizes."""

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        if modality == "image":
            return [tiles(self.config, size) for size in inputs["image_sizes"].tolist()]
        return [clip(self.config, len(pixels)) for pixels in inputs["pixel_values_videos"]]


def clip(config: Any, count: int) -> StreamLayout:
    """Where the rows of a clip of `count` frames lie: pooled by two, one newline at the end."""
    side = (config.vision_config.image_size // config.vision_config.patch_size + 1) // 2
    n = count * side * side
    end, zero = torch.tensor([n]), torch.zeros(1, dtype=torch.long)
    line = torch.zeros(n, dtype=torch.long)
    return StreamLayout(torch.arange(n), n + 1, frames(count, (side, side)), end, zero, line)


@MULTIMODAL_REGISTRY.register_processor(TilesProcessor, info=TilesInfo, dummy_inputs=LlavaDummyInputsBuilder)
class PrunedLlavaNext(PrunedTiles, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-NeXT with fewer visual tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    OneVisionProcessor, info=OneVisionInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class PrunedOneVision(PrunedTiles, LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-OneVision with fewer visual tokens."""
