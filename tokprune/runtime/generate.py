"""generate(): what its steps are given is translated before masks are built, static caches and compiled decoding
included.

generate() works with lengths as prompted. `prepare_inputs_for_generation` is where a step's inputs take their last
form, and `_prefill` reads the prompt, in chunks where asked to; one of ours answers for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.adapters.base import TYPE_IDS
from tokprune.adapters.dialect import as_cache, cache_in, cache_of, logical_length, parameters
from tokprune.adapters.foreign import CACHE_VIEW, ENCODE_FIRST, GENERATE_STEP, PREFILL, PREPARE
from tokprune.adapters.types import KVCache, ModelCall, ModelOutput, Original, RotaryTable
from tokprune.runtime.cache_record import PruneState, physical_length
from tokprune.runtime.execute import execute
from tokprune.runtime.options import GenerateStep
from tokprune.runtime.plan import tokens_of
from tokprune.runtime.prefill import Prefill
from tokprune.runtime.records import encoder_records
from tokprune.runtime.tripwires import check_mask, check_record, mark_unfinished


class ConnectorStage(Prefill):
    """Pruning between encoder and LLM on one model, in its forward and its generate(); `remove` leaves it as it was."""

    def put_on(self) -> None:
        """On what a forward goes through, and on what generate() calls."""
        super().put_on()
        for name, method in ((PREPARE, "_prepare"), (PREFILL, "_prefill"), (ENCODE_FIRST, "_encode_first")):
            if hasattr(self.adapter.model, name):
                self.on.instead(self.adapter.model, name, method)

    # -- the inputs of a step

    def _prepare(self, original: Original, input_ids: Tensor, *args: object, **kwargs: object) -> ModelCall:
        kwargs.update(zip(parameters(original)[1:], args, strict=False))  # generate() uses names, a caller may not
        out = self._prepared(original, input_ids, kwargs)
        if GENERATE_STEP in out or kwargs.get("is_first_iteration", False):
            self.threads.now.passage.prepare(cache_in(kwargs))
        return out

    def _prepared(self, original: Original, input_ids: Tensor, kwargs: ModelCall) -> ModelCall:
        """What prepare_inputs_for_generation returns, with a `GenerateStep` where the base model must know of it."""
        state = self._state(cache_in(kwargs))
        thread = self.threads.now
        first = bool(kwargs.get("is_first_iteration", False))
        out: ModelCall
        if thread.physical_prefill:
            out = original(input_ids, **kwargs)
            out[GENERATE_STEP] = GenerateStep(physical=True)
        elif first and self.adapter.has_visual(kwargs):
            out = original(input_ids, **kwargs)
            out["attention_mask"] = kwargs.get("attention_mask")  # the 2-D one: a 4-D one would have logical lengths
            out[GENERATE_STEP] = GenerateStep(False, encoder_records(kwargs.get("mm_encoder_outputs") or {}))
            thread.prompt_length = input_ids.shape[1]
        elif state is not None:
            out, hidden = self._decode_step(original, input_ids, kwargs, state)
            out[GENERATE_STEP] = GenerateStep(physical=True, decode=not first, open=not hidden)
        else:
            out = original(input_ids, **kwargs)
            if self.adapter.has_visual(out):  # without a cache, every step reads the prompt and the answer so far
                records = encoder_records(out.get("mm_encoder_outputs") or {})
                out[GENERATE_STEP] = GenerateStep(False, records, thread.prompt_length)
        return out

    def _decode_step(
        self, original: Original, input_ids: Tensor, kwargs: ModelCall, state: PruneState
    ) -> tuple[ModelCall, bool]:
        """A step without pictures on the cache of a pruned prompt, at physical lengths; whether a mask hides keys."""
        cache = cache_in(kwargs)
        held = check_record(cache, state, input_ids.shape[0])
        length = kwargs.get("next_sequence_length")
        length = input_ids.shape[1] if length is None else length
        mask = state.key_mask(kwargs.get("attention_mask"), physical_length(cache) + length)
        check_mask(mask, None if held is None else held + length, length, cache, state.has_fill)
        out: ModelCall = original(input_ids, **{**kwargs, "attention_mask": mask})
        if out.get("position_ids") is None and not hasattr(self.adapter.base, "compute_3d_position_ids"):
            out["position_ids"] = self.adapter.positions(out, tokens_of(out))  # the model would count the keys
        if out.get("position_ids") is not None:
            out["position_ids"] = state.shifted(out["position_ids"])
        return out, mask is not None

    # -- the prefill

    def _encode_first(self, original: Original, *args: object, **kwargs: object) -> ModelCall:
        """generate() encodes pictures before its prefill."""
        with self.recorder.before_prefill():
            out: ModelCall = original(*args, **kwargs)
            return out

    def _prefill(
        self,
        original: Original,
        input_ids: Tensor,
        generation_config: object,
        model_kwargs: ModelCall,
        **kwargs: object,
    ) -> ModelOutput:
        """generate()'s prefill. In chunks, the whole prompt is shortened first, then transformers splits the short
        one."""
        passage = self.threads.now.passage
        passage.prefill = True
        try:
            return self._prefilled(original, input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            passage.prefill = False

    def _prefilled(
        self, original: Original, ids: Tensor, config: object, model_kwargs: ModelCall, **kwargs: object
    ) -> ModelOutput:
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        chunked = getattr(config, "prefill_chunk_size", None) is not None
        if not chunked or not any(v is not None for v in encoded.values()):
            return original(ids, config, model_kwargs, **kwargs)
        if self.options.decoder is not None:
            self.options.decoder.refuse_chunks()
        cache = cache_in(model_kwargs)
        state = self._state(cache)
        call = self._whole_prompt(ids, config, model_kwargs)
        plan = self._plan(call, dict(encoded))
        if plan is None or (plan.untouched and state is None):
            return self._chunks(original, None, ids, config, model_kwargs, **kwargs)
        new, forward, table = execute(self.adapter, plan, call)
        if self.last is not None:
            self.last.index = forward.index
        # prepare_inputs_for_generation takes positions that count from 0; PaliGemma's makes them count from 1.
        positions, first = new["position_ids"], self.adapter.family.first_position
        if call["position_ids"] is None:
            positions = positions - first
        else:
            forward.state.count_from(first)
        held = new["attention_mask"].shape[-1] - new["input_ids"].shape[1]
        shortened = {
            **model_kwargs,
            "mm_encoder_outputs": new["mm_encoder_outputs"] or {},
            "attention_mask": new["attention_mask"],
            "position_ids": _from_start(positions, held),  # transformers slices them by the cache's length
            **{k: _from_start(new[k], held) for k in TYPE_IDS if k in call},
        }
        if state is not None:
            setattr(cache, CACHE_VIEW, "physical")
        try:
            out = self._chunks(original, table, new["input_ids"], config, shortened, **kwargs)
        except BaseException:
            mark_unfinished(model_kwargs, None)
            raise
        finally:
            if state is not None:
                setattr(cache, CACHE_VIEW, "logical")
        self._attach(cache_of(out), forward)
        return out

    def _whole_prompt(self, ids: Tensor, config: object, model_kwargs: ModelCall) -> ModelCall:
        """The call of the base model that reads the new part of a prompt at once."""
        cache: KVCache = cache_in(model_kwargs)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        total = mask.shape[1] if mask is not None else getattr(config, "_mask_length", ids.shape[1])
        length = total - logical_length(cache)
        return {
            "input_ids": ids[:, -length:],
            "attention_mask": mask,
            "position_ids": None if positions is None else positions[..., -length:],
            **as_cache(type(self.adapter.base).forward, cache),
            **{k: model_kwargs[k][:, -length:] for k in TYPE_IDS if model_kwargs.get(k) is not None},
        }

    def _chunks(self, original: Original, table: RotaryTable | None, *args: object, **kwargs: object) -> ModelOutput:
        """transformers' own chunked prefill of a prompt that is not to be planned again, piece by piece."""
        thread = self.threads.now
        thread.physical_prefill, thread.passage.chunked, thread.rotary_table = True, True, table
        try:
            return original(*args, **kwargs)
        finally:
            thread.physical_prefill, thread.passage.chunked, thread.rotary_table = False, False, None


def _from_start(values: Tensor, held: int) -> Tensor:
    """Values of new tokens (..., P) as (..., held + P), with nothing said of the keys before them."""
    return torch.nn.functional.pad(values, (held, 0))
