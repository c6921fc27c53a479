"""What vLLM finds under its entry point: names of models that prune. They are loaded when a server asks for one."""

from __future__ import annotations

from tokprune.errors import unknown
from tokprune.types import JsonObject

PREFIX = "Tokprune"
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "tokprune.serving.llava:PrunedLlava",
    "LlavaNextForConditionalGeneration": "tokprune.serving.anyres:PrunedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "tokprune.serving.anyres:PrunedOneVision",
    "Qwen2_5_VLForConditionalGeneration": "tokprune.serving.qwen:PrunedQwen25VL",
    "Qwen3VLForConditionalGeneration": "tokprune.serving.qwen:PrunedQwen3VL",
    "InternVLForConditionalGeneration": "tokprune.serving.internvl:PrunedInternVL",
}
"""Architecture of a checkpoint's config.json -> the class that serves it pruned, under the name with PREFIX."""


def register() -> None:
    """Name the pruned models to vLLM; it calls this in each of its processes, in some of them twice."""
    from vllm import ModelRegistry

    for name, path in ARCHITECTURES.items():
        if PREFIX + name not in ModelRegistry.models:
            ModelRegistry.register_model(PREFIX + name, path)


def overrides(architecture: str, method: str = "divprune", **settings: object) -> JsonObject:
    """The `hf_overrides` with which vLLM serves a checkpoint pruned: LLM(..., hf_overrides=overrides(...)).

    architecture: as config.json of the checkpoint names it. settings: ratio or budget, and the method's options as a
    dictionary `options`; checked when the server reads them.
    """
    if architecture not in ARCHITECTURES:
        raise unknown("architecture to serve pruned", architecture, ARCHITECTURES)
    return {"architectures": [PREFIX + architecture], "tokprune": {"method": method, **settings}}
