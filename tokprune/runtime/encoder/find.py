"""From a model to its vision tower, and what of the tower its connector uses."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokprune.adapters.base import unwrap
from tokprune.adapters.families import family_named
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.encoder import eva, hf_vit, openclip, qwen, timm_vit
from tokprune.runtime.encoder.tower import Tower

TOWERS = ("vision_tower", "vision_model", "visual")
KNOWN = "timm (EVA included) and open_clip ViTs, and CLIP, SigLIP, SigLIP 2, InternVL and Qwen-VL towers of transformers, alone or in a VLM"


def used_depth(config: Any, blocks: int) -> int:
    """How many blocks feed the features that a VLM selects (`vision_feature_layer`, one or a list of hidden states)."""
    layer = getattr(config, "vision_feature_layer", None)
    if layer is None:
        return blocks
    chosen = [layer] if isinstance(layer, int) else list(layer)
    depth = max(n if n >= 0 else blocks + 1 + n for n in chosen)
    if not 1 <= depth <= blocks:
        raise UnsupportedModelError(f"vision_feature_layer={layer!r} does not fit a tower of {blocks} blocks.")
    return depth


def find_tower(model: nn.Module) -> Tower:
    """The tower of a timm, open_clip or Hugging Face model, or an error that says why it has none that can be
    spliced.
    """
    inner: Any = unwrap(model)
    if timm_vit.is_tower(inner):
        return timm_vit.tower(inner)
    if eva.is_tower(inner):
        return eva.tower(inner)
    visual = getattr(inner, "visual", None)
    for candidate in (inner, visual):
        if isinstance(candidate, nn.Module) and openclip.is_tower(candidate):
            return openclip.tower(candidate, inner)
        trunk = getattr(candidate, "trunk", None)
        if isinstance(trunk, nn.Module) and timm_vit.is_tower(trunk):  # open_clip with a tower of timm
            return timm_vit.tower(trunk, inner)
        if isinstance(trunk, nn.Module) and eva.is_tower(trunk):
            return eva.tower(trunk, inner)
    if hf_vit.layers(inner) is not None:
        return hf_vit.tower(inner, inner)
    if qwen.is_tower(inner):
        return qwen.tower(inner, inner)
    base = getattr(inner, "base_model", inner)
    vlm = any(hasattr(base, name) for name in ("language_model", "text_model")) and not hasattr(
        base, "visual_projection"
    )
    for name in TOWERS:
        candidate = getattr(base, name, None)
        if not isinstance(candidate, nn.Module):
            continue
        if qwen.is_tower(candidate):
            return qwen.tower(candidate, inner)
        found = hf_vit.layers(candidate)
        if found is not None:
            if not vlm:
                return hf_vit.tower(candidate, inner)
            depth = used_depth(inner.config, len(found))
            return hf_vit.tower(
                candidate,
                inner,
                depth,
                family_named(str(inner.config.model_type)).joined_side(base, inner.config),
                vlm=True,
            )
        raise UnsupportedModelError(
            f"the vision tower {type(candidate).__name__} of {type(inner).__name__} cannot be reduced inside; known are {KNOWN}. Methods of the "
            "connector stage work on its output."
        )
    raise UnsupportedModelError(
        f"{type(inner).__name__} has no vision tower that can be reduced inside; known are {KNOWN}."
    )
