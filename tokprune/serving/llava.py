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

from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import plain
from tokprune.errors import UnsupportedModelError
from tokprune.serving.model import Pruned
from tokprune.serving.processor import served
from tokprune.serving.signals import TowerSignals
from tokprune.tokens import Layout


def check_tower(config: Any) -> None:
    """Refuse towers whose pictures are no plain grid of patches."""
    kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    grid = kind == "siglip_vision_model" or (kind == "clip_vision_model" and strategy == "default")
    if not grid or not isinstance(config.vision_feature_layer, int):
        raise UnsupportedModelError(
            f"LLaVA with a tower {kind!r}, vision_feature_select_strategy={strategy!r} and vision_feature_layer="
            f"{config.vision_feature_layer!r} is not served pruned; CLIP with 'default' and SigLIP are, with one layer."
        )


class Watched(Pruned):
    """Mixin of the LLaVA kin: signals from the CLIP or SigLIP tower."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_tower(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tower: Any = self.vision_tower  # type: ignore[attr-defined]
        vision = self.config.vision_config
        blocks, cls = tower.vision_model.encoder.layers, vision.model_type == "clip_vision_model"
        self.tokprune_signals = TowerSignals(self.tokprune.method.needs, blocks, vision.num_hidden_layers, cls)
        self.tokprune_signals.watch_output(tower)

    def read(self, modality: str, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        values = self.tokprune_signals.take(side * side)
        return {name: self._arranged(modality, inputs, value) for name, value in values.items()}

    def _arranged(self, modality: str, inputs: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Values of patches (U, patches, ...) as values of each picture's or clip's rows (R, ...)."""
        shape = values.shape[2:]
        rows = self.arrange(modality, inputs, values.flatten(2) if shape else values[..., None])
        return [x.reshape(x.shape[0], *shape) for x in rows]

    def arrange(self, modality: str, inputs: Mapping[str, Any], values: Tensor) -> list[Tensor]:
        """Values of patches (U, patches, C) as rows (R, C) of each picture or clip."""
        return list(values)


@served(LlavaMultiModalProcessor, LlavaProcessingInfo, LlavaDummyInputsBuilder)
class PrunedLlava(Watched, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5 with fewer visual tokens."""

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        side = math.isqrt(features[0].shape[0])
        return [plain(Layout.grid(side, side))] * len(features)
