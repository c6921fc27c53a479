"""What the decoder stage cannot do with a model or a call, said before anything is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import CACHE, parameters
from tokprune.adapters.types import KVCache, Model, ModelCall, Positional
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.decoder_base import DecoderMethod
from tokprune.runtime.attention_row import check_kernel

LAYER: tuple[str, ...] = (
    *("hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position", *CACHE),
    *("use_cache", "output_attentions", "output_router_logits"),
)
"""Arguments of a decoder layer that are known."""
INSTEAD = "Methods of the connector stage run in this model."


def check_range(adapter: Adapter, what: str, layers: Sequence[int]) -> None:
    """Refuse layers that the LLM does not have, or in front of which nothing can be dropped. what: a method's name."""
    text, name = adapter.text_model, type(adapter.model).__name__
    depth = len(getattr(text, "layers", ()))
    lowest = max(
        1, len(getattr(getattr(adapter.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    )
    if not layers or layers[0] < lowest or layers[-1] >= depth:
        why = "" if lowest == 1 else f", and adds DeepStack features to all visual tokens behind the first {lowest}"
        allowed = f"{lowest} <= layer <= {depth - 1}" if depth > lowest else "it has too few"
        raise OptionError(
            f"method {what!r} drops tokens in front of layers {list(layers)}; the LLM of {name} has {depth} layers"
            f"{why}: {allowed}. Give the method's layers, or schedule=((layer, share), ...)."
        )


def check_windows(adapter: Adapter, what: str) -> None:
    """Refuse layers with a sliding window, whose caches cut themselves. what: a method's name."""
    for i, layer in enumerate(adapter.layers):
        if getattr(layer.self_attn, "sliding_window", None):
            raise UnsupportedModelError(
                f"layer {i} of {type(adapter.model).__name__} has a sliding window, and its cache lets go of keys by "
                f"itself; {what!r} cannot take others out of it."
            )


def check_layers(adapter: Adapter, method: DecoderMethod, what: str) -> None:
    """Refuse a model in whose layers tokens cannot be dropped. what: the name of the method that needs it."""
    text, name = adapter.text_model, type(adapter.model).__name__
    if adapter.hybrid:
        raise UnsupportedModelError(
            f"{name} has recurrent layers, whose state every token changes: what is left of a prompt cannot be told "
            f"from what was dropped in them. {INSTEAD}"
        )
    for i, layer in enumerate(text.layers):
        unknown = [p for p in parameters(type(layer).forward) if p not in LAYER]
        attention = getattr(layer, "self_attn", None)
        if "position_embeddings" not in parameters(type(layer).forward) or unknown:
            given = f"takes {', '.join(unknown)}" if unknown else "takes no position_embeddings"
            raise UnsupportedModelError(
                f"{type(layer).__name__} of {name} {given}: tokens cannot be cut there. {INSTEAD}"
            )
        if attention is None or getattr(attention, "is_kv_shared_layer", False):
            kind = "no self_attn" if attention is None else "the keys of another layer"
            raise UnsupportedModelError(f"layer {i} of {name} has {kind}: tokens cannot be dropped there. {INSTEAD}")
        if "middle" in method.reads and not hasattr(layer, "mlp"):
            raise UnsupportedModelError(f"{what!r} reads what enters the MLP, but layer {i} of {name} has no mlp.")
    if "normed" in method.reads and not any(hasattr(text, n) for n in ("norm", "final_layernorm")):
        raise UnsupportedModelError(f"{what!r} reads states behind the last norm, but the LLM of {name} has no norm.")
    check_kernel(adapter.kernel, "decoder")


def check_arguments(layer: Model, args: Positional, kwargs: ModelCall, width: int) -> None:
    """Refuse what a decoder layer is given for each of `width` tokens where nobody here knows how to cut it."""
    unknown = [
        name
        for name, value in kwargs.items()
        if name not in LAYER and isinstance(value, Tensor) and width > 1 and width in value.shape
    ]
    tables = kwargs.get("position_embeddings")
    fits = isinstance(tables, tuple) and all(isinstance(t, Tensor) and t.ndim == 3 for t in tables)
    if len(args) > 1 or unknown or not fits:
        what = f"{', '.join(unknown)} for each token" if unknown else "positions in a way that cannot be cut"
        raise UnsupportedModelError(
            f"{type(layer).__name__} is given {what}, so tokens cannot be dropped in front of it. Methods of the "
            "decoder stage do not run in this model; those of the connector stage do."
        )


def refuse_packed(what: str) -> NoReturn:
    """Samples stand in one row. what: a method's name."""
    raise UnsupportedModelError(
        f"samples are packed into one row, and {what!r} works from the last token of each prompt; give them as rows of "
        "a batch, with an attention_mask."
    )


def check_call(adapter: Adapter, method: DecoderMethod, cache: KVCache, call: ModelCall, first: int | None) -> None:
    """Refuse a call of the language model in which tokens cannot be dropped, or are dropped already. first: the first
    layer in front of which tokens are to be dropped.
    """
    name, kernel = method.info.name, adapter.kernel
    check_kernel(kernel, "decoder")
    if getattr(cache, "is_compileable", False):
        raise UnsupportedModelError(
            f"{type(cache).__name__} has one fixed length for all layers, and {name!r} leaves them different numbers "
            "of tokens; use the default cache (DynamicCache) with methods of the decoder stage."
        )
    if first is None:
        return
    if call.get("cu_seq_lens_q") is not None:
        refuse_packed(name)
    planes = call.get("deepstack_visual_embeds")
    if planes is not None and len(planes) > first:
        raise UnsupportedModelError(
            f"this model adds DeepStack features behind its first {len(planes)} layers, and {name!r} drops tokens in "
            f"front of layer {first}."
        )
    if "flash" in kernel and any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ())):
        raise UnsupportedModelError(
            "under flash attention, layers with a sliding window count the tokens that are left instead of those of "
            'the prompt; call model.set_attn_implementation("sdpa") for methods of the decoder stage.'
        )
    text = adapter.text_model
    if text.training and torch.is_grad_enabled() and getattr(text, "is_gradient_checkpointing", False):
        raise UnsupportedModelError(
            "gradient checkpointing runs layers again in the backward pass, where nothing tells which tokens were "
            f"left; call model.gradient_checkpointing_disable() to train with {name!r}."
        )
