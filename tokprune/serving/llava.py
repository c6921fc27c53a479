"""LLaVA-1.5 in vLLM: one grid per picture, one-dimensional positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import plain
from tokprune.errors import UnsupportedModelError
from tokprune.serving.model import Pruned
from tokprune.serving.processor import PrunedInfo, PrunedProcessor
from tokprune.tokens import Layout


def check_tower(config: Any) -> None:
    """Refuse towers whose pictures are no plain grid of patches."""
    kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    grid = kind == "siglip_vision_model" or (kind == "clip_vision_model" and strategy == "default")
    if not grid:
        raise UnsupportedModelError(
            f"LLaVA with a tower {kind!r} and vision_feature_select_strategy={strategy!r} is not served pruned; CLIP with "
            "'default', and SigLIP are."
        )


class Info(PrunedInfo, LlavaProcessingInfo):  # type: ignore[misc]
    pass


class Processor(PrunedProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class PrunedLlava(Pruned, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5 with fewer visual tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_tower(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        side = math.isqrt(features[0].shape[0])
        return [plain(Layout.grid(side, side))] * len(features)
