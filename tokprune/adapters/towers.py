"""Finds the vision tower of a model, its blocks and its projectors: for signals, the encoder stage and the profiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import nn

from tokprune.adapters.base import TEXT_MODELS, unwrap
from tokprune.adapters.families import family_named
from tokprune.adapters.hf_tower_kinds import why_not
from tokprune.adapters.tower_kinds import KNOWN, kind_of, reader_of
from tokprune.adapters.tower_parts import Tower, child
from tokprune.errors import MissingSignalError, UnsupportedModelError

TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
PROJECTORS = ("multi_modal_projector", "connector", "mm_projector", "aligner", "embed_vision")
INNER_PROJECTORS = ("merger", "deepstack_merger_list")  # these sit inside the tower (Qwen-VL)
BLOCKS = (
    "encoder.layers",
    "encoder.layer",
    "blocks",
    "transformer.layers",
    "layers",
    "model.layers",
    "model.layer",
    "vision_model.encoder.layers",
    "transformer.encoder.layers",
    "timm_model.blocks",
)
FEATURES_ALONE = "Methods that look at the features alone work: random, uniform, pool, divprune."


def first_child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first module under one of these names, or None."""
    return next((part for part in (child(module, name) for name in names) if part is not None), None)


def tower_of(base: nn.Module) -> nn.Module:
    """The vision tower of a multimodal base model, without the wrapper of torch.compile."""
    tower = first_child(base, TOWERS)
    if tower is None:
        raise MissingSignalError(
            f"{type(base).__name__} has no vision tower under {', '.join(TOWERS)}, so no signals can be read. "
            f"{FEATURES_ALONE}"
        )
    return child(tower, "_orig_mod") or tower


def tower_blocks(tower: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a vision tower, or the error that says that it has none."""
    for path in BLOCKS:
        blocks = child(tower, path)
        if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and any(reader_of(b) is not None for b in blocks):
            return list(blocks)
    raise MissingSignalError(
        f"attention signals cannot be read from {type(tower).__name__}: {why_not(tower)}. {FEATURES_ALONE}"
    )


def projectors_of(base: nn.Module, tower: nn.Module) -> tuple[nn.Module, ...]:
    """The modules between tower and LLM: one behind the tower, or those inside it (several with DeepStack)."""
    outer = first_child(base, PROJECTORS)
    if outer is not None:
        return (outer,)
    inner = [part for part in (child(tower, name) for name in INNER_PROJECTORS) if part is not None]
    return tuple(m for part in inner for m in (part if isinstance(part, nn.ModuleList) else (part,)))


def used_depth(config: object, blocks: int) -> int:
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
    """The tower of a timm, open_clip or Hugging Face model, or an error that says why none can be reduced inside."""
    inner: Any = unwrap(model)
    kind = kind_of(inner)
    if kind is not None:
        return kind.tower(inner, inner)
    visual = child(inner, "visual")
    for part in (visual, child(inner, "trunk"), child(visual, "trunk")):
        kind = kind_of(part)
        if kind is not None and kind.part_of_open_clip:
            return kind.tower(part, inner)
    base = getattr(inner, "base_model", inner)
    for part in (base, child(inner, "backbone")):  # a ViT with a head
        kind = kind_of(part)
        if kind is not None:
            return kind.tower(part, inner)
    tower = first_child(base, TOWERS)
    if tower is None:
        raise UnsupportedModelError(_no_tower(inner))
    tower = child(tower, "transformer") if kind_of(child(tower, "transformer")) is not None else tower  # Ovis 2
    kind = kind_of(tower)
    if kind is None:
        raise UnsupportedModelError(
            f"the vision tower {type(tower).__name__} of {type(inner).__name__} cannot be reduced inside: "
            f"{why_not(cast(nn.Module, tower))}. Known are {KNOWN}. Methods of the connector stage work on its output."
        )
    two_towers = hasattr(base, "visual_projection")  # CLIP compares pictures with texts
    if two_towers or not any(hasattr(base, name) for name in TEXT_MODELS):
        return kind.tower(tower, inner)
    family = family_named(str(inner.config.model_type))
    found = kind.tower(tower, inner, family.joined_side(base, inner.config))
    return replace(found, depth=used_depth(inner.config, found.depth), vlm=True)


def _no_tower(model: nn.Module) -> str:
    """Why a model without a vision tower cannot be reduced, and which part of it can."""
    name = type(model).__name__
    part = next((path for path, module in model.named_modules() if kind_of(module) is not None), None)
    if part is not None:
        return (
            f"{name} holds a {type(model.get_submodule(part)).__name__} at {part!r} and may call it in other ways than "
            f"by its own forward; apply to that: tokprune.apply(model.get_submodule({part!r}), ...)."
        )
    return f"{name} has no vision tower that can be reduced inside: {why_not(model)}. Known are {KNOWN}."
