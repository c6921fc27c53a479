"""The seam: hooks on one model's multimodal base that shorten its inputs, and the translation of lengths around it.

Outside the base model every length stays as prompted; inside it is as kept. A forward-pre-hook encodes the pictures, lets
the method choose, deletes dropped placeholders and hands the rest on as `mm_encoder_outputs`; the model's own forward
does everything else. A forward hook widens the output back. The record of a prefill rides on the KV cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import TYPE_IDS, Adapter, flatten
from tokprune.adapters.dialect import as_cache, bind, cache_in, cache_of, logical_length, parameters
from tokprune.adapters.hooks import Attachments, PerThread
from tokprune.adapters.query import build_queries, current_question, tokenizer_of
from tokprune.errors import MissingQueryError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.frames_base import PerFrame
from tokprune.runtime.cache_record import PruneState, Reader, attach_state, get_state, physical_length
from tokprune.runtime.contract import check_contract
from tokprune.runtime.frames.scores import FrameScorer
from tokprune.runtime.outputs import wide_path, widen_output
from tokprune.runtime.plan import Columns, Frame, Plan, StreamRecord, clear_raw, columns_of, execute, make_plan
from tokprune.runtime.reuse import are_copies, sources_of
from tokprune.runtime.streams import Recorder, Stream, build_streams, choose
from tokprune.runtime.tripwires import (
    Passage,
    check_attached,
    check_entry,
    check_given_mask,
    check_mask,
    check_record,
    check_table,
    mark_unfinished,
    width_of,
)
from tokprune.tokens import Query

MODE = "tokprune_mode"  # keyword that prepare_inputs_for_generation adds and the pre-hook takes away


@dataclass
class LastRun:
    """The last prefill. keep: (B, L) prompt columns that survived. length: physical width. policy: "keep" or "compact"."""

    keep: Tensor
    streams: list[StreamRecord]
    policy: str
    length: int
    encode_ms: float
    select_ms: float
    score_ms: float = 0.0


@dataclass
class Options:
    """What the seam needs to know of a pruning set-up."""

    method: ConnectorMethod
    keep_of: Callable[[int], int]
    positions: str = "auto"
    query: str | Sequence[str] | None = None
    processor: Any = None
    scorer: Any = None
    encoder: Any = None  # the EncoderStage of the same model, whose survivors are the candidates
    frames: PerFrame | None = None  # the frames method with what works inside the frames; `method` is it, or wraps it
    cached: bool = False  # a cache stage follows: it needs the record even of a prompt that keeps everything


class Mode:
    """Rides from prepare_inputs_for_generation to the base model as a keyword.

    physical: the call is translated already. step: it is a decode step. records: what was seen of the encoder; accelerate's
    hooks rebuild encoder outputs on the way and would lose what rides on them, but leave an object like this one alone. asked:
    length of the prompt that generate() was given, where a call holds words of the answer as well.
    """

    def __init__(self, physical: bool, encoded: Any = None, asked: int | None = None, step: bool = False) -> None:
        self.physical, self.asked, self.step = physical, asked, step
        self.records = {
            modality: record
            for modality, output in (encoded or {}).items()
            if (record := getattr(output, "tokprune_record", None)) is not None
        }


@dataclass
class _Thread:
    """The forward in flight."""

    frame: Frame | None = None
    physical_prefill: bool = False
    asked: int | None = None  # length of the prompt that this thread's generate() began with
    rope: tuple[Tensor, Tensor] | None = None
    passage: Passage = field(default_factory=Passage)


class Seam:
    """Pruning between encoder and LLM, installed on one model; `remove` leaves it as it was."""

    def __init__(self, adapter: Adapter, options: Options) -> None:
        check_contract(adapter)
        self.adapter, self.options = adapter, options
        self.threads = PerThread(_Thread)
        self.on = Attachments(self)
        self.recorder = Recorder(adapter, options.method.needs, options.scorer, options.encoder)
        self.frame_scorer = FrameScorer.of(adapter, options.frames, options.processor, options.scorer)
        self.last: LastRun | None = None
        self.reader = Reader()

    def install(self) -> None:
        """Put the hooks on; undone completely when one of them fails."""
        base, model = self.adapter.base, self.adapter.model
        self.reader.active = True
        try:
            self.on.before(base, "_pre", with_kwargs=True)
            self.on.after(base, "_post", with_kwargs=True, always_call=True)
            text = self.adapter.text_model
            self.on.before(text, "_enter", with_kwargs=True)
            self.on.after(text, "_leave", with_kwargs=True)
            for module in text.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    self.on.before(module, "_rope", with_kwargs=True)
            for name, method in (("prepare_inputs_for_generation", "_prepare"), ("_prefill", "_prefill")):
                if hasattr(model, name):
                    self.on.instead(model, name, method)
            self.recorder.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook and instance attribute away."""
        self.reader.active = False
        self.recorder.remove()
        self.on.remove()

    def release(self) -> None:
        """Let go of the model's parts: it is gone."""
        self.recorder.probe = None

    def anchor(self) -> Any:
        """The model that this seam belongs to."""
        return self.adapter.model

    def _state(self, cache: Any) -> PruneState | None:
        """The pruning record of a cache, which this seam reads from now on."""
        state = get_state(cache)
        if state is not None:
            state.reader = self.reader
        return state

    # -- generate(): translate before masks are built, static caches and compiled decoding included ----------------------

    def _prepare(self, original: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs.update(
            zip(parameters(original)[1:], args, strict=False)
        )  # by name: generate() uses names, a caller may not
        out = self._prepared(original, input_ids, kwargs)
        if MODE in out or kwargs.get("is_first_iteration", False):
            self.threads.now.passage.prepare(cache_in(kwargs))
        return out

    def _prepared(self, original: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        cache = cache_in(kwargs)
        state = self._state(cache)
        out: dict[str, Any]
        first = bool(kwargs.get("is_first_iteration", False))
        if self.threads.now.physical_prefill:
            out = original(input_ids, **kwargs)
            out[MODE] = Mode(physical=True)
            return out
        if first and self.adapter.has_visual(kwargs):
            out = original(input_ids, **kwargs)
            out["attention_mask"] = kwargs.get("attention_mask")  # the 2-D one: a 4-D one would have logical lengths
            out[MODE] = Mode(physical=False, encoded=kwargs.get("mm_encoder_outputs"))
            self.threads.now.asked = input_ids.shape[1]
            return out
        if state is None:
            out = original(input_ids, **kwargs)
            if self.adapter.has_visual(out):  # without a cache, every step reads the prompt and the answer so far
                encoded = out.get("mm_encoder_outputs")
                out[MODE] = Mode(physical=False, encoded=encoded, asked=self.threads.now.asked)
            return out
        held = check_record(cache, state, input_ids.shape[0])
        length = kwargs.get("next_sequence_length")
        length = input_ids.shape[1] if length is None else length
        mask = state.key_mask(kwargs.get("attention_mask"), physical_length(cache) + length)
        check_mask(mask, None if held is None else held + length, length, cache, state.has_fill)
        out = original(input_ids, **{**kwargs, "attention_mask": mask})
        if out.get("position_ids") is not None:
            out["position_ids"] = state.shifted(out["position_ids"])
        out[MODE] = Mode(physical=True, step=not first)
        return out

    def _prefill(
        self, original: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """generate()'s prefill. In chunks, the whole prompt is shortened first, then transformers splits the short one."""
        passage = self.threads.now.passage
        passage.prefill = True
        try:
            return self._prefilled(original, input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            passage.prefill = False

    def _prefilled(
        self, original: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        if generation_config.prefill_chunk_size is None or not any(v is not None for v in encoded.values()):
            return original(input_ids, generation_config, model_kwargs, **kwargs)
        cache: Any = cache_in(model_kwargs)
        state = self._state(cache)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        total = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", input_ids.shape[1])
        length = total - logical_length(cache)
        call = {
            "input_ids": input_ids[:, -length:],
            "attention_mask": mask,
            "position_ids": None if positions is None else positions[..., -length:],
            **as_cache(type(self.adapter.base).forward, cache),
            **{k: model_kwargs[k][:, -length:] for k in TYPE_IDS if model_kwargs.get(k) is not None},
        }
        plan = self._plan(call, dict(encoded))
        if plan is None or (plan.untouched and state is None):
            return self._chunks(original, input_ids, generation_config, model_kwargs, kwargs)
        new, frame, table = execute(self.adapter, plan, call, self._hide_positions())
        held = new["attention_mask"].shape[-1] - new["input_ids"].shape[1]
        shortened = {
            **model_kwargs,
            "mm_encoder_outputs": new["mm_encoder_outputs"] or {},
            "attention_mask": new["attention_mask"],
            "position_ids": _from_start(new["position_ids"], held),  # transformers slices them by the cache's length
            **{k: _from_start(new[k], held) for k in TYPE_IDS if k in call},
        }
        if state is not None:
            cache._tokprune_view = "physical"
        try:
            out = self._chunks(original, new["input_ids"], generation_config, shortened, kwargs, table)
        except BaseException:
            mark_unfinished(model_kwargs, None)
            raise
        finally:
            if state is not None:
                cache._tokprune_view = "logical"
        self._attach(cache_of(out), frame)
        return out

    def _attach(self, cache: Any, frame: Frame) -> None:
        """Let the cache that a pruned prefill filled carry its record."""
        frame.state.reader = self.reader
        attach_state(cache, frame.state)
        check_attached(cache, frame.state)

    def _chunks(self, original: Any, ids: Any, config: Any, model_kwargs: Any, kwargs: Any, rope: Any = None) -> Any:
        """transformers' own chunked prefill of a prompt that is not to be planned again, piece by piece."""
        thread = self.threads.now
        thread.physical_prefill, thread.passage.chunked, thread.rope = True, True, rope
        try:
            return original(ids, config, model_kwargs, **kwargs)
        finally:
            thread.physical_prefill, thread.passage.chunked, thread.rope = False, False, None

    # -- forward of the multimodal base model -----------------------------------------------------------------------------

    def _pre(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mode = kwargs.pop(MODE, None)
        thread = self.threads.now
        _leave_path(thread.frame)
        thread.frame = None  # an interrupt may have left one behind: torch does not call hooks after a BaseException
        if not thread.physical_prefill:
            thread.rope = None
        if not torch.compiler.is_compiling():
            thread.passage.begin(None)
        if mode is not None and mode.physical:
            if not torch.compiler.is_compiling():
                thread.passage.arrive(cache_in(kwargs), translated=True)
                thread.passage.begin(width_of(args, kwargs), mode.step, thread.rope is not None)
            return args, kwargs
        call = bind(module, args, kwargs)
        x = columns_of(call) if call.get("input_ids") is not None or call.get("inputs_embeds") is not None else None
        concerned = x is not None and (self.adapter.has_visual(call) or get_state(cache_in(call)) is not None)
        thread.passage.arrive(cache_in(call), translated=mode is not None or not concerned)
        if x is not None and self.adapter.has_visual(call):
            encoded = self.adapter.encode(call)
            for modality, record in ({} if mode is None else mode.records).items():
                if encoded.get(modality) is not None and not hasattr(encoded[modality], "tokprune_record"):
                    encoded[modality] = copy.copy(encoded[modality])
                    encoded[modality].tokprune_record = record
            plan = self._plan(call, encoded, None if mode is None else mode.asked)
            state = self._state(cache_in(call))
            if plan is None or (plan.untouched and state is None):  # only avoid encoding twice
                call["mm_encoder_outputs"] = encoded
                clear_raw(call)
                return (), call
            new, frame, thread.rope = execute(self.adapter, plan, call, self._hide_positions())
            frame.for_generate = mode is not None
            frame.as_tuple = not _wants_dict(self.adapter, call)
            frame.path = wide_path(self.adapter.text_model, call, frame.expand, frame.index)
            thread.frame = frame
            thread.passage.begin(frame.index.shape[1], table_due=thread.rope is not None)
            return (), {**new, "return_dict": True}
        state = self._state(cache_in(call))
        if x is not None and state is not None:  # a hand-written decode loop, or a text-only turn on a kept cache
            cache = cache_in(call)
            check_record(cache, state, x.shape[0])
            check_given_mask(call.get("attention_mask"), logical_length(cache) + x.shape[1], cache)
            positions = self.adapter.positions(call, x)
            keys = physical_length(cache) + x.shape[1]
            call["attention_mask"] = state.key_mask(
                call.get("attention_mask"), keys, x.shape[1], self.adapter.model.dtype
            )
            call["position_ids"] = state.shifted(positions)
            for name in TYPE_IDS:
                call.pop(name, None)
            thread.passage.begin(x.shape[1])
            return (), call
        return args, kwargs

    def _post(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        thread = self.threads.now
        frame, thread.frame = thread.frame, None
        _leave_path(frame)
        if not thread.physical_prefill:
            thread.rope = None
        if output is not None:
            check_table(thread.passage)
        thread.passage.begin(None)
        if frame is None or output is None:
            return None
        cache = cache_of(output)
        cache = frame.past if cache is None else cache
        if cache is not None and physical_length(cache) > 0:
            self._attach(cache, frame)
        widen_output(output, frame.expand, not frame.for_generate, frame.path)
        return output.to_tuple() if frame.as_tuple else output

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the language model: what it is given fits the keys that it has."""
        if not torch.compiler.is_compiling():
            check_entry(self.threads.now.passage, self.reader, args, kwargs, MODE)

    def _leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Behind the language model: a cache that a pruned prefill filled waits for its record."""
        if not torch.compiler.is_compiling() and self.threads.now.frame is not None:
            mark_unfinished(kwargs, output)

    def _rope(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Exchange contiguous positions for the kept ones, when attention must not see gaps."""
        table = self.threads.now.rope
        if table is None:
            return None
        self.threads.now.passage.table_due = False
        kept, pad = table
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        whole = positions.shape[1] == kept.shape[1]  # else a chunk of the prompt, told by its place
        positions = kept if whole else kept.gather(1, (positions + pad).clamp(max=kept.shape[1] - 1))
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def _hide_positions(self) -> bool:
        return "flash" in str(self.adapter.config.get_text_config()._attn_implementation)

    # -- the decision ---------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _plan(self, call: dict[str, Any], encoded: dict[str, Any], asked: int | None = None) -> Plan | None:
        """What to do with the columns of a call. asked: how many of them are the prompt, where generate() wrote the rest."""
        encode_ms = (
            sum(r.seconds for v in encoded.values() if (r := getattr(v, "tokprune_record", None)) is not None) * 1e3
        )
        sources = {m: sources_of(v) for m, v in encoded.items() if v is not None}
        survivors = self.adapter.family.prepare_encoded(call, encoded)
        columns = Columns.of(self.adapter, call, encoded)
        masks = columns.placeholders
        start = time.perf_counter()
        with torch.no_grad():
            queries = self._queries(call, columns, encoded, asked)
            streams = []
            for modality, where in masks.items():
                if encoded.get(modality) is None or not bool(where.any()):
                    continue
                streams += build_streams(
                    self.adapter,
                    modality,
                    encoded[modality],
                    where,
                    queries,
                    self.options.method.needs,
                    ids=call.get("input_ids"),
                    survivors=survivors.get(modality),
                    decode=None if self.options.processor is None else tokenizer_of(self.options.processor).decode,
                    source=sources.get(modality),
                    x=columns_of(call),
                )
            if not streams:
                return None
            score_ms = self._frames(streams, encoded)
            choose(self.options.method, streams, self.options.keep_of)
        select_ms = (time.perf_counter() - start) * 1e3 - score_ms
        plan = make_plan(self.adapter, call, encoded, columns, streams, self.options.positions)
        plan.untouched &= not self.options.cached
        width = max(int(plan.keep.sum(1).max()), 1)
        self.last = LastRun(plan.keep, plan.streams, plan.policy, width, encode_ms, select_ms, score_ms)
        return plan

    def _frames(self, streams: list[Stream], encoded: dict[str, Any]) -> float:
        """Score the frames of videos and note what is none, as the frames method asks. Returns the milliseconds it took."""
        frames = self.options.frames
        if frames is None:
            return 0.0
        for stream in streams:
            stream.note = frames.note(stream.tokens)
            if stream.note and self.adapter.family.frames_by_words and self.options.processor is None:
                stream.note += "; this model's frames are told from pictures with apply(..., processor=processor) only"
        start = time.perf_counter()
        if self.frame_scorer is not None:
            options, always = self.options, self.options.method.drops_at_full_budget
            asked = [s for s in streams if always or options.keep_of(len(s.tokens)) < len(s.tokens)]
            self.frame_scorer.fill(asked, encoded)
        return (time.perf_counter() - start) * 1e3

    def _repeated(self, call: dict[str, Any], columns: Columns, encoded: dict[str, Any], copies: int) -> bool:
        """Whether the batch is every prompt and its pictures `copies` times."""
        x = columns_of(call)
        for modality, where in columns.placeholders.items():
            if encoded.get(modality) is None:
                continue
            features, counts = torch.cat(flatten(encoded[modality].pooler_output)), where.sum(1).tolist()
            if sum(counts) == len(features) and not are_copies(x, counts, features, [None] * len(counts), copies):
                return False
        return True

    def _queries(
        self, call: dict[str, Any], columns: Columns, encoded: dict[str, Any], asked: int | None
    ) -> list[Query | None]:
        real = columns.visible
        if not self.options.method.query_aware:
            return [None] * real.shape[0]
        ids = call.get("input_ids")
        rows = [None if ids is None else ids[b, :asked][real[b, :asked]] for b in range(real.shape[0])]
        config = self.adapter.config
        visual = [
            t
            for t in (getattr(config, "image_token_id", None), getattr(config, "video_token_id", None))
            if t is not None
        ]
        given, expand = current_question(self.options) or self.options.query, 1
        if given is None and self.options.processor is not None and columns.segments is not None:
            raise MissingQueryError(
                "a packed row holds several samples, each with a question of its own, and the prompt does not tell which picture a "
                'question is about. Give one for all: with pruning.query("..."), or run the samples as rows of a batch.'
            )
        if given is not None and not isinstance(given, str) and len(given) and real.shape[0] % len(given) == 0:
            expand = real.shape[0] // len(given)
            if expand > 1 and self._repeated(call, columns, encoded, expand):  # beams repeat prompts
                given = [q for q in given for _ in range(expand)]
        table = self.adapter.base.get_input_embeddings()
        return build_queries(self.options.processor, table, rows, given, visual, self.options.scorer)


def _wants_dict(adapter: Adapter, call: dict[str, Any]) -> bool:
    """Whether the caller of a forward gets a ModelOutput, not a tuple."""
    given = call.get("return_dict")
    return bool(getattr(adapter.base.config, "return_dict", True) if given is None else given)


def _from_start(values: Tensor, held: int) -> Tensor:
    """Values of new tokens (..., P) as (..., held + P), with nothing said of the keys before them."""
    return torch.nn.functional.pad(values, (held, 0))


def _leave_path(frame: Frame | None) -> None:
    """Take the hooks of a forward's gradient path off."""
    if frame is not None and frame.path is not None:
        frame.path.remove()
