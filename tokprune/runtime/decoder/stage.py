"""The decoder stage: in front of some layers of the LLM a method drops visual tokens of the prompt.

Layer 0 gets the whole prompt as the connector stage left it; lengths, masks and positions that transformers makes are
about it. A deeper layer gets the tokens that are left: hidden states, mask, rotation and position ids are cut on its
doorstep. Which slot of layer 0 each key of a deeper layer is stands on the cache's record, so that decode steps cut
their masks to it, and beams, copies, crops and later turns keep it.

Where positions are numbered anew, the numbers end where they ended before: rotation tells distances alone, so that
tokens behind the prompt keep their positions in every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import cache_in, swap_cache
from tokprune.adapters.foreign import CANDIDATES, FORWARD
from tokprune.adapters.hooks import Attached, Attachments, PassingStandIn, PerThread
from tokprune.adapters.types import Model, ModelCall, ModelOutput, Positional
from tokprune.config import PruneConfig
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.cache_base import CacheMethod
from tokprune.methods.decoder_base import DecoderMethod
from tokprune.registry import MethodInfo
from tokprune.runtime.cache import View
from tokprune.runtime.cache_record import Reader, get_state, physical_length
from tokprune.runtime.decoder.attention import LayerInputs
from tokprune.runtime.decoder.candidates import Candidates, candidates_of, spared
from tokprune.runtime.decoder.choose import Dropper
from tokprune.runtime.decoder.compact import Compaction
from tokprune.runtime.decoder.frame import Frame, Live, VisualCall
from tokprune.runtime.decoder.support import (
    check_arguments,
    check_call,
    check_layers,
    check_range,
    check_windows,
    refuse_packed,
)
from tokprune.runtime.execute import PrunedForward
from tokprune.runtime.outputs import widen
from tokprune.runtime.plan import Plan
from tokprune.runtime.records import StreamRecord
from tokprune.runtime.stages import Stages
from tokprune.runtime.tripwires import check_layer_lengths, width_of
from tokprune.schedule import Schedule


@dataclass
class _Now:
    """What this thread's forward of the language model is in the middle of."""

    frame: Frame | None = None
    prompt: VisualCall | None = None
    open: bool = False

    @contextlib.contextmanager
    def aside(self) -> Iterator[Frame | None]:
        """The forward in flight, while a method may ask a layer for what it computes: that is not of this forward."""
        frame, self.frame = self.frame, None
        try:
            yield frame
        finally:
            self.frame = frame


@dataclass(frozen=True)
class Nothing(DecoderMethod):
    """No drop: a method of the cache stage works alone."""

    info: ClassVar[MethodInfo] = MethodInfo("nothing", "none")


class DecoderStage(Attached):
    """A decoder method on one model; `remove` leaves it as it was.

    method: None where tokens are not dropped and a method of the cache stage alone cuts keys (`compaction`).
    count: tokens left behind the last drop of a picture with n of them, None where the method's own schedule says it.
    share: the same as a share of the whole, where it is one. positions: "keep" or "compact" instead of the method's own
    policy ("auto").
    """

    def __init__(
        self,
        adapter: Adapter,
        method: DecoderMethod | None,
        count: Callable[[int], int] | None = None,
        share: float | None = None,
        positions: str = "auto",
        compaction: Compaction | None = None,
    ) -> None:
        self.drops, self.compaction = method is not None, compaction
        self.adapter, self.method, self.count, self.share = adapter, method or Nothing(), count, share
        self.compact = (self.method.positions if positions == "auto" else positions) == "compact"
        self.on = Attachments(self)
        self.threads = PerThread(_Now)
        self.reader = Reader()  # the pruning's, once this is a part of one
        self.depth = len(adapter.layers)
        share = 0.5 if share is None and count is not None else share
        self.layers = self.schedule(share).layers if self.drops else ()
        name = self.method.info.name if compaction is None or self.drops else compaction.method.info.name
        self.name = name
        if self.drops:
            check_range(adapter, name, self.layers)
        check_layers(adapter, self.method, name)
        if compaction is not None:
            check_windows(adapter, compaction.method.info.name)

    # -- on and off

    def put_on(self) -> None:
        """On the language model, its layers and what makes their positions."""
        model, text = self.adapter.model, self.adapter.text_model
        self.on.before(text, "_begin", with_kwargs=True)
        self.on.after(text, "_end", with_kwargs=True, always_call=True)
        # Stand-ins, not hooks: a decode step passes every layer, and a hook costs it several times as much.
        for i, layer in enumerate(text.layers):
            self.on.instead(layer, FORWARD, "_layer", i, kind=PassingStandIn)
            if "middle" in self.method.reads:
                self.on.instead(layer.mlp, FORWARD, "_mlp", i, kind=PassingStandIn)
        if self.compact:
            for module in text.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    self.on.after(module, "_after_rotary", with_kwargs=True)
        if hasattr(model, CANDIDATES):
            self.on.instead(model, CANDIDATES, "_refuse_assistance")

    def release(self) -> None:
        """The model is gone; there is nothing to let go of."""

    def anchor(self) -> Model:
        """The model that this stage belongs to."""
        return self.adapter.model

    def notes(self) -> list[str]:
        """What the cache stage freed in the last prefill, for the report."""
        if self.compaction is None:
            return []
        name, freed = self.compaction.method.info.name, self.compaction.freed.values()
        if not freed:
            return [f"{name} has freed nothing yet (it works behind a prompt with pictures, with a KV cache)"]
        before, behind = sum(b for b, _ in freed), sum(a for _, a in freed)
        return [f"{name}: keys and values of {len(freed)} layers take {behind} bytes instead of {before}"]

    # -- what is to be dropped

    def schedule(self, share: float | None) -> Schedule:
        """Where and how many tokens are dropped when `share` of them is to be left."""
        own = self.method.schedule
        return self.method.plan(self.depth, share) if own is None else Schedule(own)

    def prepare(self, plan: Plan, forward: PrunedForward, prompt_length: int | None) -> VisualCall:
        """What there is to drop in a planned prefill."""
        if plan.columns.packed:
            refuse_packed(self.name)
        signals = [s.signals for s in plan.streams]
        for stream in plan.streams:
            stream.signals = {}
        width, device, answer = forward.index.shape[1], forward.index.device, plan.answer(prompt_length)
        filler, slot = plan.slots(width)
        candidates = candidates_of(plan.streams, slot.to(device), signals, self.count)
        candidates = spared(candidates, width - 1 - answer)
        numbers = torch.arange(width, device=device).expand_as(forward.index)
        live = Live(torch.where(forward.index < 0, -1, numbers), [width - n for n in filler])
        steps = self._steps(candidates) if self.drops else {}
        notes: list[dict[str, Tensor]] = [{} for _ in candidates]
        budgets: list[int | None] = [None for _ in candidates]
        if self.compaction is not None and (count := self.compaction.count) is not None:
            budgets = [sum(count(s.kept) for s in plan.streams if s.row == row) for row in range(len(candidates))]
        bound, history = self.count is not None or self.method.schedule is not None, [(0, list(candidates))]
        return VisualCall(forward, candidates, steps, bound, live, forward.index, answer, notes, budgets, history)

    def note_signals(self, streams: list[StreamRecord]) -> None:
        """Keep what the vision tower said of the tokens that were chosen, for the method."""
        for stream in streams:
            at = stream.selection.indices
            values = {name: stream.tokens.signal(name) for name in self.method.needs}
            stream.signals = {name: value[at.to(value.device)] for name, value in values.items()}

    def expect(self, prompt: VisualCall | None, open: bool = False) -> None:
        """The next forward of the language model in this thread is of `prompt`, or of no pictures. open: no mask hides
        keys, whatever the masks in the call look like.
        """
        now: _Now = self.threads.now
        now.prompt, now.open = prompt, open

    def _steps(self, rows: list[Candidates]) -> dict[int, list[int | None]]:
        """What is to be left of the candidates of each prompt in front of each layer."""
        steps: dict[int, list[int | None]] = {}
        for b, row in enumerate(rows):
            total, final = row.total, row.final
            share = self.share if final is None or not total or self.share is not None else final / total
            schedule = self.schedule(share)
            for layer, keep in zip(schedule.layers, schedule.counts(total, final), strict=True):
                steps.setdefault(layer, [None] * len(rows))[b] = max(keep - row.fixed, 0)
        return steps

    # -- one forward of the language model

    @torch.compiler.disable
    def _begin(self, module: Model, args: Positional, kwargs: ModelCall) -> None:
        now: _Now = self.threads.now
        prompt, now.prompt, now.frame = now.prompt, None, None
        cache = cache_in(kwargs)
        state = get_state(cache)
        if prompt is None and (state is None or not state.layers or state.reader is not self.reader):
            return  # the cache may be of another model's prompt, which shares this language model
        width, past = width_of(args, kwargs) or 0, physical_length(cache)
        first = None if prompt is None else min(prompt.steps, default=None)
        check_call(self.adapter, self.method, cache, kwargs, first)
        if state is not None:
            check_layer_lengths(cache, state.layers, past)
        plain = now.open or kwargs.get("attention_mask") is None
        now.frame = Frame(self.adapter, past, width, cache, state, plain, prompt)

    @torch.compiler.disable
    def _end(self, module: Model, args: Positional, kwargs: ModelCall, output: ModelOutput) -> None:
        now: _Now = self.threads.now
        frame, now.frame = now.frame, None
        if frame is None or frame.prompt is None or output is None:
            return
        if self.compaction is not None:
            self.compaction.behind_all(frame, frame.prompt)
        expand = {id(live): live.expand(frame.width) for _, live in frame.lives}
        states, path = output.get("hidden_states"), frame.prompt.forward.path
        if states is not None and frame.lives and path is None:
            lives = [frame.live_in(i - 1) for i in range(len(states))]  # state i is what layer i - 1 gave
            output.hidden_states = tuple(
                h if h is None or live is None else widen(h, expand[id(live)])
                for h, live in zip(states, lives, strict=True)
            )
        if frame.lives and not frame.prompt.forward.for_generate:
            last = output.last_hidden_state
            output.last_hidden_state = widen(last, expand[id(frame.lives[-1][1])])
            if path is not None:  # it has widened the others
                output.hidden_states = tuple(output.last_hidden_state if h is last else h for h in states)
        frame.prompt.forward.state.layers = frame.layers

    def idle(self, kwargs: ModelCall) -> bool:
        """Whether a call of a layer or its MLP is none of this stage's business: every layer asks in every step."""
        if torch.compiler.is_compiling():  # the answer must not become a part of compiled code
            return False
        frame: Frame | None = self.threads.now.frame
        return frame is None or (frame.idle and kwargs.get("attention_mask") is None)

    def _layer(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of layer i: on what is left in front of it."""
        args, kwargs = self._narrow(i, args, kwargs)
        output = forward(*args, **kwargs)
        if self.compaction is not None:
            self._compact_behind(i)
        return output

    @torch.compiler.disable
    def _narrow(self, i: int, args: Positional, kwargs: ModelCall) -> tuple[Positional, ModelCall]:
        """The arguments of layer i for the tokens that are left."""
        now: _Now = self.threads.now
        with now.aside() as frame:
            if frame is None:
                return args, kwargs
            if frame.prompt is None:  # a decode step, or a later turn of words
                keys = frame.keys(i)
                if keys is None or (kwargs.get("attention_mask") is None and not keys.has_fill):
                    return args, kwargs
                return args, frame.rewritten(i, kwargs, None)
            return self._drop(i, frame, frame.prompt, args, kwargs)

    def _drop(
        self, i: int, frame: Frame, prompt: VisualCall, args: Positional, kwargs: ModelCall
    ) -> tuple[Positional, ModelCall]:
        """The arguments of layer i in a prefill, where it is its turn after dropping some."""
        module = self.adapter.layers[i]
        hidden = args[0] if args else kwargs["hidden_states"]
        if frame.cache is None:
            frame.cache = cache_in(kwargs)  # the language model makes one where it is given none
        check_arguments(module, args, kwargs, frame.width)
        if i == 0 and "embeddings" in self.method.reads:
            frame.saved["embeddings"] = hidden
        original, before = kwargs, frame.live
        if frame.live is not None or frame.keys(i) is not None:
            kwargs = frame.rewritten(i, original, frame.live)
        if i in prompt.steps:
            dropper = Dropper(self.method, frame, prompt, i, LayerInputs(module, hidden, kwargs, held=frame.held(i)[1]))
            hidden = dropper.drop(self.adapter.text_model)
            frame.release(i < max(prompt.steps))
            if frame.live is not before:
                kwargs = frame.rewritten(i, original, frame.live)
                frame.narrow_path(prompt)
        frame.note(i)
        if i + 1 in prompt.steps or (self.compaction is not None and not self.compaction.method.follows):
            kwargs = self._watch(module, hidden, kwargs, frame)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _watch(self, module: Model, hidden: Tensor, kwargs: ModelCall, frame: Frame) -> ModelCall:
        """Keep at hand what the layer below a drop is given and which keys it uses."""
        inputs = LayerInputs(module, hidden, kwargs)
        frame.saved["below"] = inputs
        cache = cache_in(kwargs)
        if cache is None:
            return kwargs

        def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            inputs.used = keys, values
            return keys, values

        return swap_cache(kwargs, View(cache, note))

    @torch.compiler.disable
    def _compact_behind(self, i: int) -> None:
        now: _Now = self.threads.now
        with now.aside() as frame:
            if frame is None or frame.prompt is None or self.compaction is None or "below" not in frame.saved:
                return
            self.compaction.behind_layer(frame, frame.prompt, i, frame.saved["below"])
            if i + 1 not in frame.prompt.steps:
                del frame.saved["below"]

    def _mlp(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame: Frame | None = self.threads.now.frame
        if frame is not None and frame.prompt is not None and i + 1 in frame.prompt.steps:
            frame.saved["middle"] = args[0]
        return forward(*args, **kwargs)

    @torch.compiler.disable
    def _after_rotary(self, module: Model, args: Positional, kwargs: ModelCall, output: Any) -> None:
        frame: Frame | None = self.threads.now.frame
        if frame is None or frame.prompt is None:
            return
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

        def again(positions: Tensor) -> tuple[Tensor, Tensor]:
            if "position_ids" in kwargs:
                tables = module.forward(*args, **{**kwargs, "position_ids": positions})
            else:
                tables = module.forward(args[0], positions, *args[2:], **kwargs)
            return tables[0], tables[1]

        frame.tables[id(output[0])] = output[0], again, positions

    def refuse_chunks(self) -> None:
        """A prompt is not read in chunks."""
        raise UnsupportedModelError(
            f"{self.method.info.name!r} looks at the whole prompt in front of a layer, which a prefill in chunks never "
            "has there; generate without prefill_chunk_size."
        )

    @staticmethod
    def _refuse_assistance(*args: object, **kwargs: object) -> object:
        raise UnsupportedModelError(
            "assisted decoding and prompt lookup put drafted tokens behind the prompt in its first forward, while a "
            "method of the decoder stage looks at the prompt's last token: the answers would differ. Generate without "
            "assistant_model and prompt_lookup_num_tokens."
        )


def stage_of(adapter: Adapter, config: PruneConfig, stages: Stages) -> DecoderStage:
    """The stage inside the LLM: a decoder method, a cache method that frees memory, or both."""
    method, compact = stages.decoder, stages.cache
    if isinstance(compact, CacheMethod):
        raise OptionError(
            f"{compact.info.name!r} lets all layers read the same visual keys, and a method of the decoder stage "
            "leaves them different ones; it cannot run beside one. Methods of the cache stage that free memory can: "
            "mustdrop_cache, fastkv, kvmerger."
        )
    if compact is not None and compact.follows and method is None:
        raise OptionError(
            f"{compact.info.name!r} keeps what a method of the decoder stage kept last, and none is there. Write "
            f"method=['mustdrop', {compact.info.name!r}]."
        )
    alone = stages.chooser is None and (config.ratio is not None or config.budget is not None)
    count, share = (config.count, config.ratio) if alone else (None, None)
    if method is not None or compact is None:
        compaction = None if compact is None else Compaction(compact)
        return DecoderStage(adapter, method, count, share, config.positions, compaction)
    propagation = None if share == 1 else compact.propagation(len(adapter.layers))  # ratio=1 changes nothing
    return DecoderStage(adapter, propagation, None, None, config.positions, Compaction(compact, count))
