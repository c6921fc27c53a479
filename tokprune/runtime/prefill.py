"""Hooks on one model's multimodal base that shorten its inputs, and widen its outputs back.

Outside the base model every length stays as prompted; inside it is as kept. A prefill goes through these steps, a file
each: encode the pictures, cut the features into streams, let the method choose, plan which columns stay, execute the
plan by handing a shorter call on as `mm_encoder_outputs`. The model's own forward does everything else, and `outputs`
widens what it returns. The record of a prefill rides on the KV cache.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from tokprune.adapters.base import TYPE_IDS, Adapter
from tokprune.adapters.dialect import bind, cache_in, cache_of, logical_length
from tokprune.adapters.foreign import GENERATE_STEP
from tokprune.adapters.hooks import Attached, Attachments, PerThread
from tokprune.adapters.query import tokenizer_of
from tokprune.adapters.types import (
    EncoderOutput,
    KVCache,
    Model,
    ModelCall,
    ModelOutput,
    Positional,
    Replaced,
)
from tokprune.errors import TokpruneError
from tokprune.runtime.cache_record import PruneState, Reader, attach_state, get_state, physical_length
from tokprune.runtime.contract import check_contract
from tokprune.runtime.encode import Recorder, encode, encoding_ms
from tokprune.runtime.execute import PrunedForward, clear_raw, execute
from tokprune.runtime.frames.scores import FrameScorer
from tokprune.runtime.grouping import grouped
from tokprune.runtime.lookahead import FirstPass, looking_ahead
from tokprune.runtime.no_effect import check_columns, nothing_dropped
from tokprune.runtime.options import GenerateStep, Options, ThreadState
from tokprune.runtime.outputs import check_head, wide_path, widen_output
from tokprune.runtime.plan import Columns, Plan, make_plan, tokens_of
from tokprune.runtime.prompt_budget import Demand
from tokprune.runtime.questions import give_examples, questions_of
from tokprune.runtime.records import LastRun, StreamRecord
from tokprune.runtime.reuse import sources_of
from tokprune.runtime.streams import Encoded, Prompts, build_streams
from tokprune.runtime.tripwires import (
    check_attached,
    check_callers_mask,
    check_entry,
    check_record,
    check_table,
    mark_unfinished,
    width_of,
)


class Prefill(Attached):
    """Pruning between encoder and LLM in forwards of one model; `remove` leaves it as it was."""

    def __init__(self, adapter: Adapter, options: Options) -> None:
        check_contract(adapter)
        self.adapter, self.options = adapter, options
        self.threads = PerThread(ThreadState)
        self.on = Attachments(self)
        self.recorder = Recorder(adapter, options.needs, options.scorer, options.encoder)
        self.frame_scorer = FrameScorer.of(adapter, options.frames, options.processor, options.scorer)
        self.ahead = FirstPass(adapter, options.method.needs)
        self.last: LastRun | None = None
        self.told = False  # that a prompt lost nothing
        self.reader = Reader()

    def put_on(self) -> None:
        """On the base model, the language model, what makes its positions, and what encodes."""
        base, text = self.adapter.base, self.adapter.text_model
        self.reader.active = True
        self.on.before(base, "_before_base", with_kwargs=True)
        self.on.after(base, "_after_base", with_kwargs=True, always_call=True)
        self.on.before(text, "_before_llm", with_kwargs=True)
        self.on.after(text, "_after_llm", with_kwargs=True)
        for module in text.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                self.on.before(module, "_before_rotary", with_kwargs=True)
        self.recorder.install()

    def remove(self) -> None:
        """Take every hook and instance attribute away."""
        self.reader.active = False
        self.recorder.remove()
        super().remove()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "active": self.reader.active}

    def __setstate__(self, state: dict[str, object]) -> None:
        """A pickled model goes on reading caches; a cache that is pickled alone waits for a pruning that reads it."""
        active = bool(state.pop("active"))
        vars(self).update(state)
        self.reader.active = active

    def release(self) -> None:
        """Let go of the model's parts: it is gone."""
        self.recorder.probe = None

    def anchor(self) -> Model:
        """The model that this pruning belongs to."""
        return self.adapter.model

    def _state(self, cache: KVCache) -> PruneState | None:
        """The pruning record of a cache, which this pruning reads from now on."""
        state = get_state(cache)
        if state is None:
            return None
        if state.layers and self.options.decoder is None:
            raise TokpruneError(
                "this cache was filled under a method of the decoder stage, so that its layers hold different tokens, "
                "which this pruning does not know how to read. Apply one with a method of the decoder stage (any can), "
                "or start with a new cache."
            )
        state.reader = self.reader
        return state

    def _attach(self, cache: KVCache, forward: PrunedForward) -> None:
        """Let the cache that a pruned prefill filled carry its record."""
        forward.state.reader = self.reader
        attach_state(cache, forward.state)
        check_attached(cache, forward.state)

    # -- forward of the multimodal base model

    def _before_base(self, module: nn.Module, args: Positional, kwargs: ModelCall) -> Replaced:
        if looking_ahead():
            return None
        step: GenerateStep | None = kwargs.pop(GENERATE_STEP, None)
        thread, compiling = self.threads.now, torch.compiler.is_compiling()
        self._forget(thread)  # an interrupt may have left one behind: torch does not call hooks after a BaseException
        if not compiling:
            thread.passage.begin(None)
        if step is not None and step.physical:
            if self.options.decoder is not None:
                self.options.decoder.expect(None, step.open)
            if not compiling:
                thread.passage.arrive(cache_in(kwargs), translated=True)
                thread.passage.begin(width_of(args, kwargs), step.decode, thread.rotary_table is not None)
            return args, kwargs
        call = bind(module, args, kwargs)
        cache, visual = cache_in(call), self.adapter.has_visual(call)
        has_tokens = call.get("input_ids") is not None or call.get("inputs_embeds") is not None
        concerned = has_tokens and (visual or get_state(cache) is not None)
        thread.passage.arrive(cache, translated=step is not None or not concerned)
        if has_tokens and visual:
            return (), self._shortened(call, step)
        state = self._state(cache)
        if has_tokens and state is not None:
            return (), self._behind_pruned(call, cache, state)
        return args, kwargs

    def _shortened(self, call: ModelCall, step: GenerateStep | None) -> ModelCall:
        """A call with pictures, with its dropped columns left out."""
        thread = self.threads.now
        check_head(self.adapter, call, step is not None)
        with self.recorder.before_prefill():
            encoded = encode(self.adapter, call, None if step is None else step.records)
        state = self._state(cache_in(call))
        plan = self._plan(call, encoded, None if step is None else step.prompt_length)
        if plan is None or (plan.untouched and state is None):  # only avoid encoding twice
            call["mm_encoder_outputs"] = encoded
            clear_raw(call)
            return call
        new, forward, thread.rotary_table = execute(self.adapter, plan, call)
        if self.last is not None:
            self.last.index = forward.index
        forward.for_generate = step is not None
        forward.as_tuple = not _wants_dict(self.adapter, call)
        forward.path = wide_path(self.adapter.text_model, call, forward.expand, forward.index)
        decoder = self.options.decoder
        if decoder is not None:
            prompt = decoder.prepare(plan, forward, None if step is None else step.prompt_length)
            if self.last is not None:
                self.last.drops = prompt.drops
            decoder.expect(prompt)
        thread.forward = forward
        thread.passage.begin(forward.index.shape[1], table_due=thread.rotary_table is not None)
        return {**new, "return_dict": True}

    def _behind_pruned(self, call: ModelCall, cache: KVCache, state: PruneState) -> ModelCall:
        """A call without pictures behind a pruned prompt: a hand-written decode loop, or a turn of words on a kept
        cache.
        """
        x, mask = tokens_of(call), call.get("attention_mask")
        check_record(cache, state, x.shape[0])
        check_callers_mask(mask, logical_length(cache) + x.shape[1], cache)
        positions = self.adapter.positions(call, x)
        keys = physical_length(cache) + x.shape[1]
        dtype = self.adapter.model.dtype if isinstance(mask, Mapping) else torch.float32  # asking takes its time
        call["attention_mask"] = state.key_mask(mask, keys, x.shape[1], dtype)
        call["position_ids"] = state.shifted(positions)
        for name in TYPE_IDS:
            call.pop(name, None)
        self.threads.now.passage.begin(x.shape[1])
        return call

    def _after_base(self, module: nn.Module, args: Positional, kwargs: ModelCall, output: ModelOutput) -> ModelOutput:
        if looking_ahead():
            return None
        thread = self.threads.now
        forward = thread.forward
        self._forget(thread)
        if output is not None:
            check_table(thread.passage)
        thread.passage.begin(None)
        if forward is None or output is None:
            return None
        cache = cache_of(output)
        cache = forward.past if cache is None else cache
        if cache is not None and physical_length(cache) > 0:
            self._attach(cache, forward)
        widen_output(output, forward.expand, not forward.for_generate, forward.path)
        return output.to_tuple() if forward.as_tuple else output

    def _forget(self, thread: ThreadState) -> None:
        """Nothing is left of a forward of the base model, also of one that never reached the language model."""
        _remove_path(thread.forward)
        thread.forward = None
        if not thread.physical_prefill:
            thread.rotary_table = None
        if self.options.decoder is not None:
            self.options.decoder.expect(None)

    # -- forward of the language model

    def _before_llm(self, module: nn.Module, args: Positional, kwargs: ModelCall) -> Replaced:
        """What the language model is given fits the keys that it has; rows of other lengths may run first."""
        if torch.compiler.is_compiling() or looking_ahead():
            return None
        try:
            check_entry(self.threads.now.passage, self.reader, args, kwargs)
        except TokpruneError:
            self._forget(self.threads.now)
            raise
        forward, table = self.threads.now.forward, self.threads.now.rotary_table
        if forward is None or args or table is not None or forward.path is not None:
            return None
        forward.grouped, note = grouped(module, kwargs, forward.lengths, self.options.packing)
        if self.last is not None:
            self.last.note = "; ".join(part for part in (self.last.note, note) if part)
        return None if forward.grouped is None else ((), forward.grouped.begin(module))

    def _after_llm(self, module: nn.Module, args: Positional, kwargs: ModelCall, output: ModelOutput) -> ModelOutput:
        """A cache that a pruned prefill filled waits for its record."""
        forward = self.threads.now.forward
        if torch.compiler.is_compiling() or forward is None:
            return None
        if forward.grouped is not None:
            kwargs, output = forward.grouped.call, forward.grouped.finish(output)
        mark_unfinished(kwargs, output)
        return output

    def _before_rotary(self, module: nn.Module, args: Positional, kwargs: ModelCall) -> Replaced:
        """Exchange contiguous positions for the kept ones, when attention must not see gaps."""
        table = self.threads.now.rotary_table
        if table is None:
            return None
        self.threads.now.passage.table_due = False
        kept, filler = table
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]  # (B, P)
        whole = positions.shape[1] == kept.shape[1]  # else a chunk of the prompt, told by its place
        positions = kept if whole else kept.gather(1, (positions + filler).clamp(max=kept.shape[1] - 1))
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    # -- the decision

    @torch.compiler.disable
    def _plan(
        self, call: ModelCall, encoded: dict[str, EncoderOutput], prompt_length: int | None = None
    ) -> Plan | None:
        """What to do with the columns of a call; None where no picture fills any.

        prompt_length: how many of the columns are the prompt, where generate() wrote the rest.
        """
        options, encode_ms = self.options, encoding_ms(encoded)
        sources = {m: sources_of(output) for m, output in encoded.items() if output is not None}
        survivors = self.adapter.family.prepare_encoded(call, encoded)
        columns = Columns.of(self.adapter, call, encoded)
        start = time.perf_counter()
        with torch.no_grad():
            decode = None if options.processor is None else tokenizer_of(options.processor).decode
            questions = questions_of(self.adapter, options, call, columns, encoded, prompt_length)
            prompts = Prompts(tokens_of(call), questions, decode, columns.ids)
            streams: list[StreamRecord] = []
            check_columns(self.adapter, encoded, columns.placeholders, options.may_drop)
            for modality, where in columns.placeholders.items():
                if encoded.get(modality) is None or not bool(where.any()):
                    continue
                one = Encoded(modality, encoded[modality], where, sources.get(modality), survivors.get(modality))
                streams += build_streams(self.adapter, one, prompts, options.needs)
            if not streams:
                return None
            if options.method.reads_examples:
                give_examples(self.adapter, options, call, columns, streams)
            demand = Demand.of(options, streams, columns, call, prompt_length)
            if demand.reduced:
                self.ahead.fill(call, encoded, columns, streams, prompt_length, self.threads.now)
            score_ms = self._score_frames(streams, demand.reduced, encoded)
            shares = demand.choose(options.method)
            if options.decoder is not None:
                options.decoder.note_signals(streams)
        select_ms = (time.perf_counter() - start) * 1e3 - score_ms
        plan = make_plan(self.adapter, call, encoded, columns, streams, options.positions, options.cached)
        width = max(int(plan.keep.sum(1).max()), 1)  # of the host, like all of the plan
        note = nothing_dropped(plan.streams, options.ratio)
        times = (encode_ms, select_ms, score_ms)
        self.last = LastRun(plan.keep, plan.streams, plan.policy, width, *times, note, shares)
        if note and not self.told:
            self.told = True
            warnings.warn(f"{type(self.adapter.model).__name__}: {note}", stacklevel=2)
        return plan

    def _score_frames(
        self, streams: list[StreamRecord], reduced: list[StreamRecord], encoded: dict[str, EncoderOutput]
    ) -> float:
        """Score the frames of the videos in `reduced` and note what is none, as the frames method asks. Returns the
        milliseconds it took.
        """
        options, frames = self.options, self.options.frames
        if frames is None:
            return 0.0
        for stream in streams:
            note = frames.note(stream.tokens)
            if note and self.adapter.family.frames_by_words and options.processor is None:
                note += "; this model's frames are told from pictures with apply(..., processor=processor) only"
            stream.note = "; ".join(part for part in (stream.note, note) if part)
        start = time.perf_counter()
        if self.frame_scorer is not None:
            self.frame_scorer.fill(reduced, encoded)
        return (time.perf_counter() - start) * 1e3


def _wants_dict(adapter: Adapter, call: ModelCall) -> bool:
    """Whether the caller of a forward gets a ModelOutput, not a tuple."""
    wanted = call.get("return_dict")
    return bool(getattr(adapter.base.config, "return_dict", True) if wanted is None else wanted)


def _remove_path(forward: PrunedForward | None) -> None:
    """Take the hooks of a forward's gradient path off."""
    if forward is not None and forward.path is not None:
        forward.path.remove()
