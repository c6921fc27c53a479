"""The half of a pruned model in vLLM's engine: what the encoder gives is chosen from before the engine keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokprune.adapters.families.base import StreamLayout
from tokprune.errors import OptionError, TokpruneError
from tokprune.serving.choose import Kept, Stream, choose
from tokprune.serving.settings import KEY, ServingSettings
from tokprune.serving.signals import KINDS, TowerSignals, check_signals

PIXELS = {"pixel_values": "image", "pixel_values_videos": "video"}


def check_engine(vllm_config: Any) -> None:
    """Refuse settings of the engine under which pruning would be wrong, or of which nobody knows."""
    if KEY in (vllm_config.additional_config or {}):
        raise OptionError(
            f"{KEY!r} stands in --additional-config, which the processor of prompts does not see; write it into "
            "--hf-overrides."
        )
    if vllm_config.model_config.multimodal_config.is_multimodal_pruning_enabled():
        raise OptionError("--video-pruning-rate and tokprune both prune; give one of them.")
    if vllm_config.speculative_config is not None:
        raise OptionError("speculative decoding with pruned pictures was not tried; leave --speculative-config out.")
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise OptionError(
            "LoRA on the vision tower is mapped by vLLM to as many tokens as stay, not to those that are encoded; "
            "leave --enable-tower-connector-lora out."
        )


class Pruned:
    """Mixin before a multimodal model of vLLM."""

    config: Any
    tokprune_signals: TowerSignals
    """What the vision tower tells about each token; made by the family."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.tokprune = ServingSettings.of(self.config, KINDS)
        check_engine(vllm_config)
        check_signals(self.tokprune.method.needs, vllm_config)

    def geometry(self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[StreamLayout]:
        """Where the rows of each picture or clip of an encoder call lie. features: (R, W) each."""
        raise NotImplementedError

    def read(self, modality: str, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The signals of an encoder call, (R, ...) for each picture or clip."""
        raise NotImplementedError

    def placed(
        self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor], kept: Sequence[Kept | None]
    ) -> Any:
        """What the engine keeps of each picture or clip: the kept rows, in families without M-RoPE just these."""
        return [rows if k is None else k.features for rows, k in zip(features, kept, strict=True)]

    def embed_multimodal(self, **inputs: Any) -> Any:
        """What vLLM's model gives for the pictures or the clips of an engine step, pruned in one call."""
        self.tokprune_signals.clear()  # of a call that an exception ended
        features = super().embed_multimodal(**inputs)  # type: ignore[misc]
        modalities = [modality for name, modality in PIXELS.items() if inputs.get(name) is not None]
        if features is None or len(features) == 0 or not modalities:
            return features  # embeddings made elsewhere stay as they are
        if len(modalities) > 1:
            raise OptionError("pictures and clips in one encoder call; vLLM is expected to make one for each.")
        features = [rows.flatten(0, -2) for rows in features]  # LLaVA-OneVision gives clips as (1, R, W)
        geometry = self.geometry(modalities[0], inputs, features)
        width = self.config.get_text_config().hidden_size
        for rows, layout in zip(features, geometry, strict=True):
            if len(rows) != layout.total:
                raise TokpruneError(
                    f"the encoder gave {len(rows)} rows where {layout.total} were expected of this {modalities[0]}."
                )
        signals = self.read(modalities[0], inputs)
        streams = [
            Stream(rows, layout, {name: value[i][layout.rows.to(rows.device)] for name, value in signals.items()})
            for i, (rows, layout) in enumerate(zip(features, geometry, strict=True))
        ]
        return self.placed(modalities[0], inputs, features, choose(self.tokprune, streams, width))
