"""What each token of an answer paid to the prompt in one layer of the LLM: rows made while generate() runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import cache_in, swap_cache
from tokprune.adapters.hooks import Attachments
from tokprune.adapters.types import KVCache, Model, ModelCall, ModelOutput, Positional, Replaced
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.attention_row import check_attention, newest_row
from tokprune.runtime.cache import View
from tokprune.runtime.cache_record import get_state
from tokprune.runtime.lookahead import looking_ahead


@dataclass(frozen=True)
class AnswerRow:
    """One row of the attention map, mean over heads: of the query from which one token of the answer came."""

    weights: Tensor
    """(B, K) attention to each key, in float32."""
    columns: Tensor
    """(B, K) prompt column of each key, -1 for filler; the answer's tokens stand behind the prompt's."""


class AnswerRows:
    """Notes rows of one layer in calls of this thread: `with AnswerRows(adapter, layer) as rows: model.generate(...)`.

    Row 0 is the prompt's last token, from which the first token of the answer comes; row k is token k - 1 of the
    answer. One query a step: no attention map is made, whatever kernel the model runs. Beams are not told apart.
    """

    def __init__(self, adapter: Adapter, layer: int) -> None:
        self.adapter, self.layer = adapter, layer
        self.module: Model = getattr(adapter.layers[layer], "self_attn", None)
        if self.module is None:
            raise UnsupportedModelError(f"layer {layer} of {type(adapter.text_model).__name__} has no self_attn.")
        check_attention(self.module)
        self.on = Attachments(self)
        self._thread = threading.get_ident()
        self._keys: Tensor | None = None
        self._cache: KVCache = None
        self._seen: list[Tensor] = []

    def anchor(self) -> Model:
        """The model that is looked at."""
        return self.adapter.model

    def __enter__(self) -> AnswerRows:
        self.on.before(self.module, "_before", with_kwargs=True)
        self.on.after(self.module, "_after", with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.on.remove()

    @property
    def rows(self) -> list[AnswerRow]:
        """One per token of the answer so far."""
        if not self._seen:
            return []
        first, state = self._seen[0].shape[1], get_state(self._cache)
        whole = first + len(self._seen) - 1
        columns = torch.arange(whole, device=self._seen[0].device).expand(self._seen[0].shape[0], -1)
        if state is not None:
            own = state.layers.get(self.layer)
            if own is None:
                columns = state.columns(whole)
            else:
                slots = own.columns(whole)  # of layer 0, -1 for filler
                known = state.columns(int(slots.max()) + 1)
                columns = known.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
        out = []
        for step, weights in enumerate(self._seen):
            end = first + step
            width = min(weights.shape[1], end)  # fixed caches have empty places behind, sliding ones fewer keys
            out.append(AnswerRow(weights[:, :width], columns[:, end - width : end].to(weights.device)))
        return out

    @torch.compiler.disable
    def _before(self, module: Model, args: Positional, kwargs: ModelCall) -> Replaced:
        if threading.get_ident() != self._thread or looking_ahead():
            return None
        self._keys, cache = None, cache_in(kwargs)
        if cache is None:
            return None
        self._cache = cache
        while isinstance(self._cache, View):
            self._cache = self._cache._cache

        def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self._keys = keys
            return keys, values

        return args, swap_cache(kwargs, View(cache, note))

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, module: Model, args: Positional, kwargs: ModelCall, output: ModelOutput) -> None:
        if threading.get_ident() != self._thread or looking_ahead():
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        keys, self._keys = self._keys, None
        if keys is not None:
            held = self._cache.layers[module.layer_idx]  # with a sliding window, it holds fewer keys than it uses
            if not getattr(held, "is_sliding", False) and keys.shape[2] != held.keys.shape[2]:
                raise UnsupportedModelError(
                    f"a method of the cache stage leaves keys out of layer {self.layer}; look at a layer below it, or "
                    "take that method off."
                )
        row = newest_row(module, args, kwargs, keys)
        if hidden.shape[1] > 1:  # a prompt, or a chunk of it: what was seen before was none of this answer
            self._seen = []
        self._seen.append(row)
