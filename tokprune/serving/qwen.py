"""Qwen2.5-VL and Qwen3-VL in vLLM: the kept tokens keep their M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)

from tokprune.adapters.families.base import StreamLayout
from tokprune.adapters.families.geometry import frames, plain
from tokprune.serving.mrope import Positions
from tokprune.serving.processor import served
from tokprune.serving.signals import PackedSignals
from tokprune.tokens import Layout


class Grids(Positions):
    """Mixin: geometry of pictures and clips from their grids of patches, and signals in their order."""

    visual: Any
    tokprune_signals: PackedSignals

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tokprune_signals = PackedSignals(self.tokprune.method.needs, self.visual)

    def read(self, modality: str, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        grids = inputs[f"{modality}_grid_thw"].tolist()
        return self.tokprune_signals.rows([(t, h, w) for t, h, w in grids])

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        return [self._layout(modality, inputs, i) for i in range(len(features))]

    def _layout(self, modality: str, inputs: Mapping[str, Any], i: int) -> StreamLayout:
        t, h, w = inputs[f"{modality}_grid_thw"][i].tolist()
        merge = self.config.vision_config.spatial_merge_size
        grid = (h // merge, w // merge)
        if modality == "image":
            return plain(Layout.grid(*grid))
        return plain(frames(t, grid, self.seconds(inputs, i, t)))

    def seconds(self, inputs: Mapping[str, Any], i: int, count: int) -> Sequence[float] | None:
        """When the frames of clip `i` are shown."""
        return None

    def placeholder(self, modality: str) -> int:
        token: int = self.config.image_token_id if modality == "image" else self.config.video_token_id
        return token

    def words(self, modality: str, data: Mapping[str, Any]) -> list[int]:
        t, h, w = data[f"{modality}_grid_thw"].tolist()
        return [self.placeholder(modality)] * (t * h * w // self.config.vision_config.spatial_merge_size**2)


@served(Qwen2_5_VLMultiModalProcessor, Qwen2_5_VLProcessingInfo, Qwen2_5_VLDummyInputsBuilder)
class PrunedQwen25VL(Grids, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL with fewer visual tokens."""


@served(Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo, Qwen3VLDummyInputsBuilder, weaves=("video",))
class PrunedQwen3VL(Grids, Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen3-VL with fewer visual tokens, in its DeepStack planes, too."""

    weaves = frozenset({"video"})

    @property
    def columns(self) -> int:
        return int(self.visual_dim + self.multiscale_dim)

    def words(self, modality: str, data: Mapping[str, Any]) -> list[int]:
        if modality == "image":
            return super().words(modality, data)
        t, h, w = data["video_grid_thw"].tolist()
        ids: list[int] = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[h * w // self.config.vision_config.spatial_merge_size**2] * t,
            timestamps=data["timestamps"],
            tokenizer=self._tokenizer,
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            video_token_id=self.config.video_token_id,
        ).full
        return ids
