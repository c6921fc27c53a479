"""Mutations: with any translation switched off, the next answer is an error, never a wrong answer.

Each mutation below takes one step out, as a transformers that calls things in another way would. It must be caught in
generate() over a batch of two prompts of unequal length, for every kind of position and mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import Prompt, prompt, shared, slow_unless
from tests.adapters.shortened import with_text
from tests.spelling import cache_in, with_cache
from tokprune.adapters.foreign import GENERATE_STEP
from tokprune.errors import TokpruneError, TranslationError
from tokprune.runtime import generate, prefill
from tokprune.runtime.cache_record import PrunedCacheMixin, PruneState, get_state
from tokprune.runtime.generate import ConnectorStage
from tokprune.testing import FAMILIES

QUICK = ("llava", "qwen2_5_vl", "gemma3")  # 1-D RoPE; M-RoPE; windows, and masks that the model builds itself
FAMILIES_ALL = [slow_unless(f in QUICK, f) for f in FAMILIES]
NEW = 5
Mutation = Callable[[pytest.MonkeyPatch], None]


def attach_record_only(cache: Any, state: PruneState) -> None:
    cache._tokprune = state


def let_through(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def put(owner: Any, name: str, new: Any) -> Mutation:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, new)


def without(name: str) -> Mutation:
    return lambda monkeypatch: monkeypatch.delattr(PrunedCacheMixin, name)


def first_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps find no record; the prompt does."""
    state = ConnectorStage._state
    monkeypatch.setattr(generate, "cache_in", lambda call: None)
    monkeypatch.setattr(prefill, "cache_in", lambda call: None)
    monkeypatch.setattr(ConnectorStage, "_state", lambda self, cache: state(self, cache))


def own_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConnectorStage, "_prefilled", let_through)


MUTATIONS: dict[str, Mutation] = {
    "the record is not attached": put(prefill, "attach_state", lambda cache, state: None),
    "the cache keeps its class": put(prefill, "attach_state", attach_record_only),
    "the hook behind the model does not run": put(ConnectorStage, "_after_base", lambda self, *args: None),
    "the hook before the model does not run": put(
        ConnectorStage, "_before_base", lambda self, module, args, kwargs: None
    ),
    "prepare_inputs_for_generation is let through": put(ConnectorStage, "_prepare", let_through),
    "the cache comes by another name": first_only,
    "the mask is as prompted": put(PruneState, "key_mask", lambda self, mask, *args, **kwargs: mask),
    "the mask is lost": put(PruneState, "key_mask", lambda self, mask, *args, **kwargs: None),
    "positions are not moved": put(PruneState, "shifted", lambda self, positions: positions),
    "positions are moved twice": put(PruneState, "shifted", lambda self, p: p - 2 * self.shift),
    "the cache answers with kept lengths": without("get_seq_length"),
    "mask builders get prompted lengths": without("get_query_offset"),
}


def answer(case: Prompt, **options: Any) -> Any:
    with torch.no_grad():
        return case.tiny.model.generate(**case.inputs, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("family", FAMILIES_ALL)
def test_a_lost_translation_raises(family: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "random", ratio=0.3, positions="compact"):
        answer(case)  # as it should be
        MUTATIONS[mutation](monkeypatch)
        with pytest.raises(TranslationError):
            answer(case)
        monkeypatch.undo()
        answer(case)


@pytest.mark.parametrize(
    "mutation",
    ["prepare_inputs_for_generation is let through", "the cache comes by another name", "the mask is as prompted"],
)
@pytest.mark.parametrize("family", QUICK)
def test_a_lost_translation_raises_over_a_static_cache(
    family: str, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "random", ratio=0.3, positions="compact"):
        answer(case, cache_implementation="static")
        MUTATIONS[mutation](monkeypatch)
        with pytest.raises(TranslationError):
            answer(case, cache_implementation="static")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", QUICK)
def test_decode_steps_around_prepare_are_right_or_refused(
    family: str, cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without prepare's help a decode step is one of a hand-written loop: translated at the model, or refused."""
    case, prepare = prompt(family), ConnectorStage._prepare
    options = {} if cache is None else {"cache_implementation": cache}
    with tokprune.apply(case.tiny.model, "random", ratio=0.3, positions="compact"):
        wanted = answer(case, **options)

        def prompts_only(self: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
            first = kwargs.get("is_first_iteration", False)
            return prepare(self, original, *args, **kwargs) if first else original(*args, **kwargs)

        monkeypatch.setattr(ConnectorStage, "_prepare", prompts_only)
        if cache is None:
            assert torch.equal(answer(case), wanted)
        else:
            with pytest.raises(TranslationError):
                answer(case, **options)


@pytest.mark.parametrize("family", QUICK)
def test_chunks_that_were_not_shortened_raise(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "random", ratio=0.3):
        answer(case, prefill_chunk_size=16)
        own_chunks(monkeypatch)
        with pytest.raises(TranslationError):
            answer(case, prefill_chunk_size=16)
        monkeypatch.undo()
        monkeypatch.setattr(ConnectorStage, "_prefill", let_through)
        with pytest.raises(TranslationError):
            answer(case, prefill_chunk_size=16)
        monkeypatch.undo()
        monkeypatch.setattr(prefill, "attach_state", lambda cache, state: None)
        with pytest.raises(TranslationError):
            answer(case, prefill_chunk_size=16)


@pytest.mark.parametrize("family", QUICK)
def test_a_call_that_is_changed_on_its_way_raises(family: str) -> None:
    """Hooks of others stand for a model that counts or builds in another way than today's."""
    model = prompt(family).tiny.model
    base = model.base_model
    text = base.language_model if hasattr(base, "language_model") else base.text_model

    def drop_keyword(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {k: v for k, v in kwargs.items() if k != GENERATE_STEP}

    def move(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + 1}

    def longer(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        masks = mask if isinstance(mask, dict) else {"": mask}
        masks = {k: None if m is None else torch.cat([m, m[..., -1:]], -1) for k, m in masks.items()}
        return args, {**kwargs, "attention_mask": masks if isinstance(mask, dict) else masks[""]}

    def fewer(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs["inputs_embeds"].shape[1] == 1:
            return args, kwargs
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"][:, 1:]}

    case = prompt(family)
    for module, change in ((base, drop_keyword), (text, move), (text, longer), (text, fewer)):
        handle = module.register_forward_pre_hook(change, with_kwargs=True)  # before those of the pruning
        try:
            with tokprune.apply(model, "random", ratio=0.3, positions="compact"), pytest.raises(TranslationError):
                answer(case)
        finally:
            handle.remove()


def turns(family: str) -> tuple[Prompt, Any, Any]:
    """A prompt, a cache that its pruned answer filled, and the call of a second turn."""
    from transformers import DynamicCache

    case = prompt(family)
    cache = DynamicCache(config=case.tiny.model.config.get_text_config())
    first = answer(case, **with_cache(cache))
    return case, cache, with_text(case.inputs, first, torch.tensor([[10, 20, 30]] * 2))


@pytest.mark.parametrize("family", QUICK)
def test_a_cache_cut_without_its_record_raises(family: str) -> None:
    model = shared(family).model
    with tokprune.apply(model, "random", ratio=0.3), torch.no_grad():
        for name, args in (("crop", (-60,)), ("batch_repeat_interleave", (2,))):
            _, cache, call = turns(family)
            base = type(cache)._tokprune_base  # type: ignore[attr-defined]
            if (name, family) == ("crop", "gemma3"):
                continue  # its windows have forgotten what was before them; transformers refuses
            if (name, family) == ("batch_repeat_interleave", "qwen2_5_vl"):
                continue  # transformers has the move of the model's own positions for two rows; it raises
            getattr(base, name)(cache, *args)
            rows = {k: v.repeat_interleave(2, 0) for k, v in call.items()} if name != "crop" else call
            with pytest.raises(TranslationError):
                model.generate(**rows, max_new_tokens=NEW, **with_cache(cache))


@pytest.mark.parametrize("family", QUICK)
def test_a_cache_emptied_without_its_record_raises(family: str) -> None:
    from transformers import StaticCache

    case = prompt(family)
    cache = StaticCache(config=case.tiny.model.config.get_text_config(), max_cache_len=700)
    with tokprune.apply(case.tiny.model, "random", ratio=0.3):
        answer(case, **with_cache(cache))
        type(cache)._tokprune_base.reset(cache)  # type: ignore[attr-defined]
        with pytest.raises(TokpruneError):
            answer(case, **with_cache(cache))


@pytest.mark.parametrize("family", QUICK)
def test_a_cache_that_no_pruning_reads_raises(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared(family).model
    with tokprune.apply(model, "random", ratio=0.3), torch.no_grad():
        _, cache, call = turns(family)
        wanted = model.generate(**call, max_new_tokens=NEW, **with_cache(copy.deepcopy(cache)))
    with tokprune.apply(model, "random", ratio=0.3), torch.no_grad():
        monkeypatch.setattr(ConnectorStage, "_state", lambda self, cache: get_state(cache))
        with pytest.raises(TokpruneError):
            model.generate(**call, max_new_tokens=NEW, **with_cache(cache))
        monkeypatch.undo()
        assert torch.equal(model.generate(**call, max_new_tokens=NEW, **with_cache(cache)), wanted)


@pytest.mark.parametrize("family", QUICK)
@torch.no_grad()
def test_a_prompt_that_was_not_finished_is_not_answered(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop by hand: the hook behind the model is left out; the cache that came back is refused, an emptied one is
    not."""
    case = prompt(family)
    model = case.tiny.model
    with tokprune.apply(model, "random", ratio=0.3):
        monkeypatch.setattr(ConnectorStage, "_after_base", lambda self, *args: None)
        out = model(**case.inputs, use_cache=True)
        monkeypatch.undo()
        token = torch.tensor([[5], [6]])
        mask = torch.cat([case.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        with pytest.raises(TranslationError, match="not finished"):
            model(input_ids=token, attention_mask=mask, **with_cache(cache_in(out)))


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_positions_that_stay_hidden_from_rotation_raise(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention is given contiguous positions (flash), the rotary embedding must have asked for the kept ones."""
    case = prompt(family)
    monkeypatch.setattr("tokprune.runtime.execute.hides_positions", lambda adapter: True)
    with tokprune.apply(case.tiny.model, "random", ratio=0.3, positions="keep"):
        answer(case)
        monkeypatch.setattr(ConnectorStage, "_before_rotary", lambda self, *args: None)
        with pytest.raises(TranslationError):
            answer(case)


@pytest.mark.parametrize("family", QUICK)
@torch.no_grad()
def test_the_language_model_alone_refuses_a_pruned_cache(family: str) -> None:
    model = shared(family).model
    base = model.base_model
    text = base.language_model if hasattr(base, "language_model") else base.text_model
    with tokprune.apply(model, "random", ratio=0.3):
        _, cache, _ = turns(family)
        embeds = model.get_input_embeddings()(torch.tensor([[5], [6]]))
        with pytest.raises(TranslationError):
            text(inputs_embeds=embeds, **with_cache(cache))
        text(inputs_embeds=embeds)  # what needs no translation runs as ever
