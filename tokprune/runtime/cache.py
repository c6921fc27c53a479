"""The cache stage: in decode steps the layers from some layer on read a part of the visual keys and values.

The attention module of the layer below gets the model's cache through a view that notes the keys it uses; with its
query they give what the newest token attends to, and the method chooses. The modules above get the cache through a view
that gathers the chosen keys and values, and the mask cut to match. Nothing leaves the cache. What was decided rides on
the pruning record of the cache itself, so that beams, copies, second turns and interleaved generations stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.dialect import cache_in, swap_cache
from tokprune.adapters.foreign import CACHE_VIEW, CANDIDATES
from tokprune.adapters.hooks import Attached, Attachments, PerThread
from tokprune.adapters.types import KVCache, Model, ModelCall, ModelOutput, Positional, Replaced
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.cache_base import CacheMethod
from tokprune.runtime.attention_row import check_attention, check_kernel, newest_row
from tokprune.runtime.cache_keys import Chosen, narrow_mask
from tokprune.runtime.cache_record import PruneState, Reader, get_state


class View:
    """A cache as one attention module sees it: what `update` returns goes through `then`."""

    def __init__(self, cache: KVCache, then: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self._cache, self._then = cache, then

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Keys and values that the attention module goes on with: (B, H, S, hd) each."""
        return self._then(*self._cache.update(keys, values, *args, **kwargs))

    def __getattr__(self, name: str) -> object:
        return getattr(self._cache, name)


@dataclass
class _Reading:
    """The keys that the reading layer of this thread's forward used."""

    keys: Tensor | None = None
    state: PruneState | None = None


class CacheStage(Attached):
    """A cache method on one model; `remove` leaves it as it was.

    count: visual keys that a prompt with n of them uses in a step.
    """

    def __init__(self, adapter: Adapter, method: CacheMethod, count: Callable[[int], int]) -> None:
        self.adapter, self.method, self.count = adapter, method, count
        self.on = Attachments(self)
        self.threads = PerThread(_Reading)
        self.reader = Reader()  # the pruning's, once this is a part of one
        self.steps, self.used, self.visual = 0, 0, 0
        layers = list(adapter.layers)
        attentions = [(i, layer.self_attn) for i, layer in enumerate(layers) if hasattr(layer, "self_attn")]
        below = [(i, a) for i, a in attentions if i < method.layer]
        self.above = [a for i, a in attentions if i >= method.layer]
        if not below or not self.above:
            first = next((i for i, _ in attentions), 0)
            last = max((i for i, _ in attentions), default=0)
            raise OptionError(
                f"layer={method.layer} of {method.info.name!r} needs an attention layer below it and one from it on; "
                f"{type(adapter.model).__name__} has {len(layers)} decoder layers: "
                + (f"{first + 1} <= layer <= {last}." if last > first else "too few.")
            )
        self.source_layer, self.source = below[-1]
        check_attention(self.source)

    def put_on(self) -> None:
        """On the layers that are read, and on those that read less."""
        check_kernel(self.adapter.kernel, "cache")
        self.on.before(self.source, "_before", with_kwargs=True)
        self.on.after(self.source, "_after", with_kwargs=True, always_call=True)
        for attention in self.above:
            self.on.before(attention, "_narrow", with_kwargs=True)
        if hasattr(self.adapter.model, CANDIDATES):
            self.on.instead(self.adapter.model, CANDIDATES, "_refuse_assistance")

    def release(self) -> None:
        """Let go of the model's layers: it is gone."""
        self.source, self.above = None, []

    def anchor(self) -> Model:
        """The model that this stage belongs to."""
        return self.adapter.model

    def notes(self) -> list[str]:
        """What the decode steps since `install` did, for the report."""
        name = self.method.info.name
        if not self.steps:
            return [
                f"{name} has reduced no decode step yet (it works on single new tokens behind a picture, with a KV "
                "cache)"
            ]
        return [
            f"{name}: {self.steps} decode steps; layers from {self.method.layer} on read {self.used} of {self.visual} "
            f"visual keys (chosen by layer {self.source_layer}); all keys stay in memory"
        ]

    # -- the layer whose attention is read

    @torch.compiler.disable
    def _before(self, module: Model, args: Positional, kwargs: ModelCall) -> Replaced:
        self.threads.now.keys = self.threads.now.state = None  # an interrupt may have left something behind
        cache = cache_in(kwargs)
        if getattr(cache, "is_compileable", False):
            raise UnsupportedModelError(
                f"{type(cache).__name__} has a fixed length for compiled decoding, from which no keys can be left out; "
                "use the default cache (DynamicCache) with methods of the cache stage."
            )
        state = get_state(cache)
        if state is None or state.visual is None or state.reader is not self.reader:
            return None  # the cache may be of another model's prompt, which shares this language model
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if hidden.shape[1] != 1 or getattr(cache, CACHE_VIEW, "logical") == "physical":
            state.chosen = None  # a prompt: the answer to it starts anew, with all keys
            return None
        if state.chosen is None:
            state.chosen = Chosen.build(state.visual, self.count)
        if state.chosen.everything:
            return None
        self.threads.now.state = state

        def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self.threads.now.keys = keys
            return keys, values

        return args, swap_cache(kwargs, View(cache, note))

    @torch.compiler.disable
    def _after(self, module: Model, args: Positional, kwargs: ModelCall, output: ModelOutput) -> None:
        keys, state = self.threads.now.keys, self.threads.now.state
        self.threads.now.keys = self.threads.now.state = None
        if keys is None or state is None or output is None:
            return
        cache = cache_in(kwargs)
        with torch.no_grad():
            row = newest_row(module, args, kwargs, keys)
            chosen: Chosen = state.chosen
            chosen.decide(self.method, row, int(cache.get_query_offset(module.layer_idx)))
        self.steps += 1
        self.used, self.visual = chosen.width, chosen.visual.shape[1]

    # -- the layers that read less

    @torch.compiler.disable
    def _narrow(self, module: Model, args: Positional, kwargs: ModelCall) -> Replaced:
        cache = cache_in(kwargs)
        state = get_state(cache)
        if cache is None or state is None or state.chosen is None or state.chosen.keys is None:
            return None
        if state.reader is not self.reader:
            return None
        chosen: Chosen = state.chosen
        if int(cache.get_query_offset(module.layer_idx)) + 1 != chosen.total:
            raise UnsupportedModelError(
                f"layer {module.layer_idx} holds other keys than layer {self.source_layer}, from which "
                f"{self.method.info.name} chose; a method of the cache stage cannot run beside one that drops tokens "
                "inside the decoder."
            )
        length, _ = cache.get_mask_sizes(1, module.layer_idx)
        index, filled = chosen.within(int(length))
        mask = self._mask(chosen, kwargs.get("attention_mask"), index, filled, kwargs)

        def gather(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            where = index.to(keys.device).clamp(min=0)
            if len(where) == 1:
                return keys.index_select(2, where[0]), values.index_select(2, where[0])
            where = where[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
            return (
                keys.gather(2, where.expand(-1, -1, -1, keys.shape[-1])),
                values.gather(2, where.expand(-1, -1, -1, values.shape[-1])),
            )

        return args, {**swap_cache(kwargs, View(cache, gather)), "attention_mask": mask}

    def _mask(
        self, chosen: Chosen, mask: Tensor | None, index: Tensor, filled: bool, kwargs: ModelCall
    ) -> Tensor | None:
        """The layer's mask at the chosen keys; all layers that share a mask share the result."""
        if mask is None and not filled:
            return None
        known = chosen.masks.get(id(mask))
        if known is not None and known[0] is mask and known[1] is not None and known[1].shape[-1] == index.shape[1]:
            return known[1]
        hidden = kwargs.get("hidden_states")
        dtype = torch.float32 if hidden is None else hidden.dtype
        cut = narrow_mask(mask, index, filled, self.adapter.kernel, dtype)
        chosen.masks[id(mask)] = (mask, cut)
        return cut

    @staticmethod
    def _refuse_assistance(*args: object, **kwargs: object) -> object:
        raise UnsupportedModelError(
            "assisted decoding and prompt lookup check several drafted tokens at once, while a method of the cache "
            "stage chooses for one new token at a time: the answers would differ. Generate without assistant_model and "
            "prompt_lookup_num_tokens."
        )
