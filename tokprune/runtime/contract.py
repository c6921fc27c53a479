"""Whether the installed transformers keeps the conventions that pruning rests on; asked by apply(), before a hook is
set.

Each convention is looked up in signatures, or tried on a cache of three keys, in milliseconds; the answer is kept for
as long as the functions looked at are the same. What holds here can still be left out by a call at run time: see
tripwires.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import (
    CACHE,
    TESTED,
    cache_name,
    is_older,
    library_cache_name,
    parameters,
    tested_versions,
)
from tokprune.adapters.types import Model, ModelCall
from tokprune.adapters.types import Original as Function
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.cache_record import PruneState, attach_state

CACHE_METHODS = (
    *("get_seq_length", "get_query_offset", "get_mask_sizes", "update", "crop", "reset"),
    *("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "is_linear"),
)


class Functions(NamedTuple):
    """What the conventions are about. Those of generation are None for a model that cannot generate."""

    model: Function
    base: Function
    text: Function
    prepare: Function | None
    own_prepare: Function | None
    prefill: Function | None
    positions: Function | None
    masks: tuple[Function | None, ...]
    cache: tuple[Function | None, ...]

    @staticmethod
    def of(adapter: Adapter) -> Functions:
        """The functions of a model's classes and of the library, as they are now."""
        from transformers import Cache, GenerationMixin, masking_utils

        model, base, text = (type(m) for m in (adapter.model, adapter.base, adapter.text_model))
        generates = hasattr(model, "generate")
        names = ("create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate")
        return Functions(
            model.forward,
            base.forward,
            text.forward,
            GenerationMixin.prepare_inputs_for_generation if generates else None,
            getattr(model, "prepare_inputs_for_generation", None) if generates else None,
            getattr(model, "_prefill", None) if generates else None,
            getattr(base, "compute_3d_position_ids", None),
            tuple(getattr(masking_utils, name, None) for name in names),
            tuple(getattr(Cache, name, None) for name in CACHE_METHODS),
        )


def _named(function: Function, *names: str, cache: bool = False) -> bool:
    """Whether a function names these arguments, and a KV cache where asked."""
    return set(names) <= set(parameters(function)) and not (cache and cache_name(function) is None)


def _takes_more(function: Function) -> bool:
    """Whether a function passes on keywords that it does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _outputs(f: Functions) -> bool:
    from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

    fields = BaseModelOutputWithPast.__dataclass_fields__
    pooled = "pooler_output" in BaseModelOutputWithPooling.__dataclass_fields__
    return pooled and {"last_hidden_state", "hidden_states"} <= set(fields) and any(n in fields for n in CACHE)


def _masks(f: Functions) -> bool:
    """Three keys that stand for 103 tokens, the first of them hidden, and one new token."""
    from transformers import DynamicCache, PretrainedConfig

    cache = DynamicCache()
    cpu: ModelCall = {"device": "cpu"}  # whatever the default is
    cache.update(torch.zeros(1, 1, 3, 2, **cpu), torch.zeros(1, 1, 3, 2, **cpu), 0)
    attach_state(
        cache, PruneState(torch.arange(3, **cpu)[None], torch.zeros(1, 104, dtype=torch.long, **cpu), 103, True)
    )
    config: Model = PretrainedConfig()
    config._attn_implementation, config.sliding_window = "eager", 2
    call = {
        "config": config,
        "inputs_embeds": torch.zeros(1, 1, 2, **cpu),
        "attention_mask": torch.tensor([[0, 1, 1, 1]], device="cpu"),
        "position_ids": torch.tensor([[103]], device="cpu"),
    }
    wanted = ([False, True, True, True], [False, False, True, True])
    for build, visible in zip(f.masks[:2], wanted, strict=True):
        if build is None:
            return False
        mask = build(**call, **{cache_name(build) or library_cache_name(): cache})
        if mask.shape != (1, 1, 1, 4) or (mask[0, 0, 0] == 0).tolist() != visible:
            return False
    return int(cache.get_seq_length()) == 103


CONVENTIONS: tuple[tuple[str, Callable[[Functions], bool]], ...] = (
    (
        f"the multimodal model's forward names its KV cache ({' or '.join(CACHE)}), input_ids, inputs_embeds, "
        "attention_mask, position_ids and mm_encoder_outputs",
        lambda f: _named(
            *(f.base, "input_ids", "inputs_embeds", "attention_mask", "position_ids", "mm_encoder_outputs"), cache=True
        ),
    ),
    (
        f"the language model's forward names its KV cache ({' or '.join(CACHE)}), inputs_embeds, attention_mask and "
        "position_ids",
        lambda f: _named(f.text, "inputs_embeds", "attention_mask", "position_ids", cache=True),
    ),
    (
        "the model's forward takes mm_encoder_outputs, and passes keywords on that it does not name",
        lambda f: _named(f.model, "mm_encoder_outputs") and _takes_more(f.model),
    ),
    (
        f"prepare_inputs_for_generation names the KV cache ({' or '.join(CACHE)}), is_first_iteration and "
        "next_sequence_length",
        lambda f: (
            f.prepare is None
            or (
                _named(f.prepare, "input_ids", "is_first_iteration", "next_sequence_length", cache=True)
                and f.own_prepare is not None
                and parameters(f.own_prepare)[:1] == ("input_ids",)
            )
        ),
    ),
    (
        "generate() reads the prompt in _prefill(input_ids, generation_config, model_kwargs)",
        lambda f: (
            f.prepare is None
            or (
                f.prefill is not None
                and parameters(f.prefill)[:3] == ("input_ids", "generation_config", "model_kwargs")
            )
        ),
    ),
    (
        f"compute_3d_position_ids names the KV cache ({' or '.join(CACHE)}), input_ids and attention_mask",
        lambda f: f.positions is None or _named(f.positions, "input_ids", "attention_mask", cache=True),
    ),
    (
        f"outputs have the fields last_hidden_state, hidden_states and {' or '.join(CACHE)}, those of encoders "
        "pooler_output",
        _outputs,
    ),
    (f"Cache has {', '.join(CACHE_METHODS)}", lambda f: None not in f.cache),
    (
        "masks are built for the keys that Cache.get_query_offset and get_mask_sizes tell, not for get_seq_length",
        lambda f: None not in f.masks and None not in f.cache and _masks(f),
    ),
)
"""What must hold, as a sentence, and how it is found out."""


@functools.lru_cache(256)
def broken(functions: Functions) -> str | None:
    """The first convention that does not hold, None if all do."""
    for sentence, holds in CONVENTIONS:
        try:
            kept = holds(functions)
        except Exception as error:
            return f"{sentence} ({type(error).__name__}: {error})"
        if not kept:
            return sentence
    return None


def check_contract(adapter: Adapter) -> None:
    """Raise UnsupportedModelError where this transformers does not keep a convention that pruning this model rests
    on."""
    problem = broken(Functions.of(adapter))
    if problem is None and is_older():
        problem = f"transformers is {TESTED[0]} or newer"
    if problem is None and "flash" in adapter.kernel:
        rotary = [m for m in adapter.text_model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        if not any("position_ids" in parameters(type(m).forward) for m in rotary):
            problem = "under flash attention, the language model has a RotaryEmbedding that takes position_ids"
    if problem is None:
        return
    first, last = TESTED[0], TESTED[-1].split(".")
    bound = f"{last[0]}.{int(last[1]) + 1}"
    raise UnsupportedModelError(
        f"{type(adapter.model).__name__} cannot be pruned here, because this does not hold: {problem}. Known to work: "
        f"{tested_versions()}. Run: pip install 'transformers>={first},<{bound}'"
    )
