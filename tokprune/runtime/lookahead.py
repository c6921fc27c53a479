"""A first pass of the LLM that stops in front of a layer: what the prompt's words pay to each visual token, as signals.

The model's own forward begins on the whole prompt; what a layer is about to be given is taken, and the forward ends
there. The rows that are wanted are made from the layer's queries and keys. So a signal of layer l costs layers 0 to
l - 1 and some projections of layer l. A cache with earlier turns is read through a copy that shares its tensors.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import cache_in, swap_cache
from tokprune.adapters.hooks import input_of
from tokprune.adapters.types import EncoderOutput, KVCache, ModelCall
from tokprune.errors import MissingSignalError, UnsupportedModelError
from tokprune.runtime.attention_row import check_attention
from tokprune.runtime.cache_record import get_state, physical_length
from tokprune.runtime.decoder.attention import LayerInputs, RowAttention
from tokprune.runtime.execute import PrunedForward, execute
from tokprune.runtime.options import ThreadState
from tokprune.runtime.plan import Columns, Plan, make_plan
from tokprune.runtime.records import StreamRecord
from tokprune.runtime.signal_blocks import LLM_SIGNALS, block_index
from tokprune.tokens import Selection

_LOOKING: ContextVar[bool] = ContextVar("tokprune_looking_ahead", default=False)


def looking_ahead() -> bool:
    """Whether this thread's call of the model is a first pass, not the forward that its caller asked for."""
    return not torch.compiler.is_compiling() and _LOOKING.get()  # a pass runs the model itself, never a compiled one


@dataclass(frozen=True)
class PromptRow:
    """The tokens of one row of the batch, as they lie in the first pass."""

    row: int
    filler: int
    """Slots in front of them."""
    n: int
    """How many they are; those that generate() wrote behind the prompt are left out."""
    behind: int
    """Place behind the last visual token."""
    device: torch.device

    def read(self, inputs: LayerInputs, kind: str) -> Tensor:
        """One signal of all n tokens, (n,) or (n, H)."""
        attention = RowAttention(inputs, self.row, self.filler, self.n, self.device)
        last = torch.tensor([self.n - 1], device=self.device)
        if kind == "llm_attention":
            return attention.weights(last)[0]
        if kind == "llm_logits":
            return attention.logits(last)[0]
        behind = torch.arange(self.behind, self.n, device=self.device)
        return attention.weights(behind if len(behind) else last, heads="each").mean(1).T


SOURCES = {
    "llm_attention": "attention of the prompt's last token in layer {} of the LLM",
    "llm_logits": "attention of the prompt's last token in layer {} of the LLM, before the softmax",
    "llm_question": "attention of the tokens behind the pictures in layer {} of the LLM, head by head",
}


class FirstPass:
    """What a method needs of the LLM of one model. needs: its signals; those of the vision tower are passed over.

    Raises OptionError for a layer that the LLM has not, UnsupportedModelError for one that cannot be read.
    """

    def __init__(self, adapter: Adapter, needs: Sequence[str]) -> None:
        self.adapter = adapter
        self.names: dict[int, list[str]] = {}
        layers = getattr(adapter.text_model, "layers", ())
        for name in needs:
            kind, colon, spec = name.partition(":")
            if kind not in LLM_SIGNALS:
                continue
            if not colon:
                raise MissingSignalError(
                    f"signal {name!r} names no layer of the LLM; write {kind}:0 for the first one."
                )
            layer = block_index(spec, len(layers), "the LLM")
            if getattr(layers[layer], "self_attn", None) is None:
                raise UnsupportedModelError(
                    f"layer {layer} of {type(adapter.text_model).__name__} has no self_attn to read {name!r} from."
                )
            check_attention(layers[layer].self_attn)
            self.names.setdefault(layer, []).append(name)

    def fill(
        self,
        call: ModelCall,
        encoded: Mapping[str, EncoderOutput],
        columns: Columns,
        streams: Sequence[StreamRecord],
        prompt_length: int | None,
        thread: ThreadState,
    ) -> None:
        """Give every stream its signals.

        prompt_length: how many of the columns are the prompt, where generate() wrote the rest. thread: of this call;
        its rotary table is that of the pass meanwhile.
        """
        if not self.names:
            return
        if columns.packed:
            raise UnsupportedModelError(
                "samples are packed into one row, and a method that looks ahead in the LLM needs the last token of "
                "each; give them as rows of a batch."
            )
        plan, firsts = self._keep_all(call, encoded, columns, streams)
        new, forward, table = execute(self.adapter, plan, call)
        prompts, slot = _prompts(plan, forward, prompt_length)
        thread.rotary_table = table
        try:
            found = self._run(new, prompts)
        finally:
            thread.rotary_table = None
        for stream, record in zip(streams, firsts, strict=True):
            at = slot[record.row, record.candidates] - prompts[record.row].filler  # (N,)
            device = stream.tokens.features.device
            signals = {name: v[at.to(v.device)].to(device) for (b, name), v in found.items() if b == record.row}
            stream.visual = replace(stream.tokens, signals={**stream.tokens.signals, **signals})
            sources = {n: SOURCES[n.partition(":")[0]].format(i) for i, names in self.names.items() for n in names}
            stream.sources = {**stream.sources, **sources}

    def _keep_all(
        self,
        call: ModelCall,
        encoded: Mapping[str, EncoderOutput],
        columns: Columns,
        streams: Sequence[StreamRecord],
    ) -> tuple[Plan, list[StreamRecord]]:
        """The plan that drops nothing, and the record of each stream, of the first copy of its prompt."""
        whole = []
        for stream in streams:
            kept = copy.copy(stream)
            kept.indices = torch.arange(stream.total)
            kept.selection = Selection(kept.indices)
            whole.append(kept)
        plan = make_plan(self.adapter, call, encoded, columns, whole, "auto", always=True)
        starts = accumulate([stream.copies for stream in streams], initial=0)  # each with its copies behind it
        return plan, [plan.streams[at] for at, _ in zip(starts, streams, strict=False)]

    def _run(self, call: ModelCall, prompts: Mapping[int, PromptRow]) -> dict[tuple[int, str], Tensor]:
        """Every signal of every prompt, by row and name. call: of the base model, translated already."""
        found: dict[tuple[int, str], Tensor] = {}
        cache: KVCache = cache_in(call)
        held = physical_length(cache)
        for layer, names in self.names.items():
            module = self.adapter.layers[layer]
            one = swap_cache({**call, "use_cache": bool(held)}, _copied(cache, layer) if held else None)
            before = _LOOKING.set(True)
            try:
                args, kwargs = input_of(module, functools.partial(self.adapter.base, **one))
            finally:
                _LOOKING.reset(before)
            inputs = LayerInputs(module, args[0] if args else kwargs["hidden_states"], kwargs, held=held)
            for b, prompt in prompts.items():
                found |= {(b, name): prompt.read(inputs, name.partition(":")[0]) for name in names}
        return found


def _prompts(plan: Plan, forward: PrunedForward, prompt_length: int | None) -> tuple[dict[int, PromptRow], Tensor]:
    """The rows with visual tokens, and the slot of each prompt column, (B, L)."""
    width, device = forward.index.shape[1], forward.index.device
    filler, slot = plan.slots(width)
    prompts = {}
    for b, pad in enumerate(filler):
        visual = slot[b, plan.visual[b]] - pad  # (V,) ascending
        if len(visual):
            n = width - pad - plan.answer(prompt_length)
            prompts[b] = PromptRow(b, pad, n, int(visual[-1]) + 1, device)
    return prompts, slot


def _copied(cache: KVCache, layer: int) -> KVCache:
    """A cache to which the pass may add keys without a trace: layers that grow make new tensors of the old ones."""
    state = get_state(cache)
    if getattr(cache, "is_compileable", False):
        raise UnsupportedModelError(
            f"{type(cache).__name__} is written in place, so that the LLM cannot look ahead on it; use the default "
            "cache (DynamicCache), or a method that needs nothing of the LLM."
        )
    if state is not None and layer in state.layers:
        raise UnsupportedModelError(
            f"layer {layer} holds fewer keys of the earlier turns than layer 0, so what this method reads there is not "
            "known; name a layer below the first drop, or begin a new conversation."
        )
    new = copy.copy(cache)
    new.layers = [copy.copy(one) for one in cache.layers]
    return new
