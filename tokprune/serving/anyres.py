"""LLaVA-NeXT and LLaVA-OneVision in vLLM: a thumbnail, tiles without their padding, newline rows; clips pooled.

All newline rows of a picture stay, also those of lines that lost all their tokens: vLLM wants to know their number
before the picture is encoded. (In transformers a newline goes with the last token of its line.)
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
from tokprune.serving.llava import Watched
from tokprune.serving.processor import PrunedInfo, PrunedProcessor
from tokprune.serving.signals import KINDS


def pack(config: Any, size: Sequence[int], values: Tensor, fill: float) -> Tensor:
    """Values of a picture's patches in the order of its rows, newlines `fill`. -> (R, C).

    size: (height, width) of the picture as it came. values: (1 + tiles, patches, C), the thumbnail first.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side = side_of(config)
    down, across = canvas_of(size, config.image_grid_pinpoints, config.vision_config.image_size)
    cut = values[1 : 1 + down * across].unflatten(0, (down, across)).unflatten(3, (side, side))
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


class TilesInfo(PrunedInfo, LlavaNextProcessingInfo):  # type: ignore[misc]
    signals = KINDS


class OneVisionInfo(PrunedInfo, LlavaOnevisionProcessingInfo):  # type: ignore[misc]
    signals = KINDS


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


def clip(config: Any, count: int) -> StreamLayout:
    """Where the rows of a clip of `count` frames lie: pooled by two, one newline at the end."""
    side = (side_of(config) + 1) // 2
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
