"""What a user calls: apply and remove."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokprune.adapters.base import check_known, unwrap
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.base import Method
from tokprune.runtime.handle import Pruning, install, remove, tower_alone, vlm_pruning

__all__ = ["Pruning", "apply", "remove"]


def apply(
    model: Any,
    method: str | Method | Sequence[str | Method] | PruneConfig = "divprune",
    *,  # options by name: this is the public entry point
    ratio: float | None = None,
    budget: int | None = None,
    positions: str = "auto",
    query: str | Sequence[str] | None = None,
    processor: Any = None,
    scorer: Any = None,
    prompt_budget: int | None = None,
    prompt_rule: str | Method | None = None,
    packing: str = "padded",
    **options: Any,
) -> Pruning:
    """Let `model` run on fewer visual tokens, in place; generate() and the processor stay as they are.

    method: a name (see list_methods), a method object, or a PruneConfig. ratio: share of visual tokens kept, or budget:
    tokens kept per image or video, or prompt_budget: tokens of the whole prompt, text first (docs/concepts.md), shared
    out over its pictures by prompt_rule ("proportional", or a method with a rule of its own: "adaptive_budget", "catp",
    or one that you built). positions: "keep" leaves the kept tokens' position ids, "compact" re-numbers, "auto"
    re-numbers for one-dimensional RoPE and keeps for M-RoPE, as the published implementations do. query: the question,
    for query-aware methods (one, or one per prompt); with `processor` it is cut out of the prompt. These methods need a
    tokenizer: without `processor` the one saved beside the model's weights is taken, if there is one. scorer: an object
    with embed_text and embed_image (embed_picture, for frames), or "open_clip:<model>/<weights>", for methods that
    compare text with pictures; or a second VLM, scorer=(model, processor) or "vlm:<hub id or folder>", which frames
    methods of score="self" ask in place of `model`. options: the method's own fields.

    A method of the frames stage shares a video's budget out over its frames: method="quota", or ["quota", "divprune"]
    to choose by the second inside each frame; images of the same prompt go to the second alone, or stay whole.

    A method of the encoder stage reduces the vision tower itself, and a VLM's LLM then gets one token per group. Stages
    compose: method=[get_method("tome", r=1), "divprune"]; the ratio is the connector's then. `model` may also be a ViT
    of timm, open_clip, torchvision or transformers: ratio is optional for methods with a schedule of their own
    (`apply(vit, "tome", r=8)`), the handle is the same.

    packing: how rows of a batch that keep different numbers run: "padded" to the longest, "grouped" (the LLM reads
    groups of like length one after the other, without filler between; refused where it cannot), "auto" (where that
    pays).

    A method of the pixels stage drops what repeats in front of the vision tower, from pixel values alone; without a
    ratio its threshold decides: apply(vlm, "pixelprune"). With stages behind it, the ratio is theirs.

    A method of the cache stage lets each new token read a part of the visual keys: method=["dycoke", "dycoke_cache"].
    Its share is its own there; alone, the ratio is.

    Applying again replaces. Raises UnsupportedModelError for models that cannot be pruned, OptionError and BudgetError
    for arguments that cannot be used; the model is then as it was.
    """
    if isinstance(method, PruneConfig):
        given = (ratio, budget, query, prompt_budget, prompt_rule)
        if any(value is not None for value in given) or options or (positions, packing) != ("auto", "padded"):
            raise OptionError(
                "a PruneConfig already says how much and how to prune; give nothing beside it, or change the config."
            )
        config = method
    else:
        config = PruneConfig.build(
            method,
            ratio,
            budget,
            positions,
            query,
            prompt_budget=prompt_budget,
            prompt_rule=prompt_rule,
            packing=packing,
            **options,
        )
    if processor is not None and not callable(processor):
        raise OptionError(
            f"processor= takes the model's processor, AutoProcessor.from_pretrained(...), not "
            f"{type(processor).__name__}: {str(processor)[:80]!r}."
        )
    if isinstance(scorer, str):
        from tokprune.runtime.scorers import load_scorer

        scorer = load_scorer(scorer, processor)
    elif isinstance(scorer, tuple):
        from tokprune.runtime.scorers import VlmScorer

        if len(scorer) != 2:
            raise OptionError(f"scorer= is a pair (model, processor), not {len(scorer)} things.")
        scorer = VlmScorer(*scorer)
    if all(m.stage in ("pixels", "encoder") for m in config.methods) and not _is_vlm(model):
        _refuse_containers(model)
        return install(tower_alone(model, config, processor=processor))
    if isinstance(model, nn.Module):
        check_known(unwrap(model))
    _refuse_containers(model)
    return install(vlm_pruning(model, config, processor, scorer))


def _refuse_containers(model: Any) -> None:
    """Name the VLM inside a module that is none itself."""
    if not isinstance(model, nn.Module) or _is_vlm(model):
        return
    parts = {name: m for name, m in unwrap(model).named_modules() if name and _is_vlm(m)}
    whole = [name for name in parts if not any(name.startswith(f"{other}.") for other in parts)]
    if whole:
        models = " and ".join(f"a {type(parts[name]).__name__} at {name!r}" for name in whole)
        raise UnsupportedModelError(
            f"{type(model).__name__} is no VLM itself but holds {models}; apply to that: "
            f"tokprune.apply(model.get_submodule({whole[0]!r}), ...)."
        )


def _is_vlm(model: Any) -> bool:
    """Whether a model has an LLM behind its vision tower, so that its tokens can be pruned there, too."""
    inner = unwrap(model) if hasattr(model, "modules") else model
    return hasattr(getattr(inner, "base_model", None), "get_image_features") and hasattr(inner.config, "text_config")
