"""One forward of the language model whose layers hold unequal numbers of tokens: what each layer is given instead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.types import KVCache, ModelCall
from tokprune.runtime.attention_row import check_tensor_mask
from tokprune.runtime.cache_record import PruneState
from tokprune.runtime.decoder.candidates import Candidates
from tokprune.runtime.decoder.columns import LayerKeys
from tokprune.runtime.execute import PrunedForward
from tokprune.runtime.masks import causal_mask, gather_mask
from tokprune.tokens import Selection


@dataclass(frozen=True)
class Live:
    """The tokens of this call that are left, padded on the left."""

    index: Tensor
    """(B, P) slot of this call, ascending, -1 for filler."""
    counts: list[int]
    """Tokens of each row, without filler."""

    @property
    def width(self) -> int:
        """Places of a row."""
        return self.index.shape[1]

    @property
    def has_fill(self) -> bool:
        """Some rows have fewer tokens than others."""
        return min(self.counts) < self.width

    def fill(self, row: int) -> int:
        """Filler in front of a row's tokens."""
        return self.width - self.counts[row]

    def find(self, row: int, slots: Tensor) -> Tensor:
        """Where `slots` lie among the tokens of a row, filler not counted."""
        return torch.searchsorted(self.index[row, self.fill(row) :].contiguous(), slots)

    def take(self, values: Tensor, dim: int = 1) -> Tensor:
        """Values of all slots of this call, at `dim` behind the batch, as those of the tokens that are left."""
        index = self.index.to(values.device).clamp(min=0)
        values = values.expand(*values.shape[: dim - 1], index.shape[0], *values.shape[dim:])
        shape = [*index.shape, *[1] * (values.ndim - dim - 1)]
        index = index.view([1] * (dim - 1) + shape)
        size = list(values.shape)
        size[dim] = index.shape[dim]
        return values.gather(dim, index.expand(size))

    def expand(self, width: int) -> Tensor:
        """(B, width) place that answers for each slot of the call: of a dropped one, the nearest before it."""
        place = torch.full((self.index.shape[0], width + 1), -1, dtype=torch.long, device=self.index.device)
        numbers = torch.arange(self.width, device=self.index.device).expand_as(self.index)
        place.scatter_(1, self.index + 1, torch.where(self.index < 0, -1, numbers))
        return place[:, 1:].cummax(1).values.clamp(min=0)


@dataclass
class VisualCall:
    """What the decoder stage knows of a call with pictures."""

    forward: PrunedForward
    """Its forward, whose record it fills."""
    candidates: list[Candidates]
    """Of each row."""
    steps: dict[int, list[int | None]]
    """By layer, how many tokens of each row are to be left in front of it, None where the row has no such step."""
    bound: bool
    """Ratio, budget or schedule say so."""
    live: Live
    """All its tokens."""
    columns: Tensor
    """(B, P) prompt column of each slot, -1 for filler."""
    answer: int
    """Tokens at the end that generate() wrote, which no method sees."""
    notes: list[dict[str, Tensor]]
    """What the method wrote down for each row."""
    budgets: list[int | None]
    """Visual keys of each row that stay in each layer, where ratio or budget are for the cache stage."""
    history: list[tuple[int, list[Candidates]]]
    """From which layer on which candidates, those that entered first."""
    drops: list[Drop] = field(default_factory=list)


@dataclass(frozen=True)
class Drop:
    """What happened in front of one layer. `pruning.last.drops` lists them."""

    layer: int
    kept: tuple[int, ...]
    """Visual tokens of each row of the batch from this layer on, separators not counted."""
    columns: Tensor = field(repr=False)
    """(B, P) prompt column of each token that is left, text too, -1 for filler."""
    selections: tuple[Selection | None, ...] = field(repr=False)
    """What the method returned for each row, None where it was not asked."""


@dataclass
class Frame:
    """One forward in flight."""

    adapter: Adapter
    past: int
    """Slots of layer 0 before this call."""
    width: int
    """Slots of this call."""
    cache: KVCache
    state: PruneState | None
    """The record that came with the cache."""
    plain: bool
    """Nothing is padded as far as the call's 2-D mask tells: there is none."""
    prompt: VisualCall | None = None
    thread: int = field(default_factory=threading.get_ident)
    live: Live | None = None
    """Since the first drop."""
    layers: dict[int, LayerKeys] = field(default_factory=dict)
    """The new record of each layer."""
    tables: dict[int, tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]] = field(default_factory=dict)
    """By id of a table of cosines: it, what makes such tables, and the positions it is for."""
    positions: dict[int, Tensor] = field(default_factory=dict)
    """Positions of the live tokens, by id of the table that they were moved in."""
    memo: dict[Any, Any] = field(default_factory=dict)
    lives: list[tuple[int, Live]] = field(default_factory=list)
    """From which layer on which tokens."""
    saved: dict[str, Any] = field(default_factory=dict)
    idle: bool = field(init=False)
    """A decode step, or a turn of words, on keys without filler: a layer without a mask is left alone."""

    def __post_init__(self) -> None:
        records = () if self.state is None else self.state.deepest.values()
        self.idle = self.prompt is None and not any(keys.has_fill for keys in records)

    def live_in(self, layer: int) -> Live | None:
        """The tokens that a layer works on; None before the first drop."""
        return next((live for first, live in reversed(self.lives) if first <= layer), None)

    # -- the keys of a layer

    def keys(self, layer: int) -> LayerKeys | None:
        """The record that a layer came with."""
        return None if self.state is None else self.state.layers.get(layer)

    def held(self, layer: int) -> tuple[int, int]:
        """Keys that a layer has had so far, and those that it still holds, which a sliding window cuts."""
        layers = getattr(self.cache, "layers", ())
        if layer >= len(layers):
            return 0, 0
        one = layers[layer]
        count = int(one.get_seq_length())
        if getattr(one, "is_sliding", False) and count:
            return count, int(one.keys.shape[-2])
        return count, count

    def all_slots(self, layer: int, live: Live | None) -> Tensor:
        """(B, K) slot of layer 0 of every key that a layer has had, those of this call included."""
        count, keys = self.held(layer)[0], self.keys(layer)
        name = ("slots", id(keys), count, id(live))
        if name not in self.memo:
            known = live.index if live is not None else keys.slots  # type: ignore[union-attr]  # one of them is there
            numbers = torch.arange(max(count, self.width), device=known.device).expand(known.shape[0], -1)
            before = numbers[:, :count] if keys is None else keys.columns(count)
            new = numbers[:, : self.width] if live is None else live.index
            new = torch.where(new < 0, -1, new + self.past)
            self.memo[name] = torch.cat([before.to(new.device), new], 1)
        return self.memo[name]

    def note(self, layer: int) -> None:
        """Write the record of a layer as it will be behind this call."""
        old, live = self.keys(layer), self.live
        if old is None and live is None:
            return
        slots = self.all_slots(layer, live)
        fill = (old is not None and old.has_fill) or (live is not None and live.has_fill)
        moved = (old is not None and old.moved) or (live is not None and bool(self.positions))
        name = ("record", id(slots), fill, moved)
        if name not in self.memo:
            self.memo[name] = LayerKeys(slots, self.past + self.width, fill, moved)
        self.layers[layer] = self.memo[name]

    def release(self, more: bool) -> None:
        """Let go of what a drop was chosen by: the peak falls with the tokens. more: there are drops to come."""
        for name in ("below", "middle", *(() if more else ("embeddings",))):
            self.saved.pop(name, None)

    def narrow_path(self, prompt: VisualCall) -> None:
        """Let the gradients of hidden states that are returned go through the tokens that are left."""
        path, live = prompt.forward.path, self.live
        if path is not None and live is not None:
            slot = prompt.forward.expand.to(live.index.device)  # (B, L)
            path.expand = live.expand(self.width).gather(1, slot)
            columns = prompt.columns.gather(1, live.index.clamp(min=0))
            path.index = columns.masked_fill(live.index < 0, -1)  # (B, P)

    # -- what a layer is given

    def rewritten(self, layer: int, kwargs: ModelCall, live: Live | None) -> ModelCall:
        """The keyword arguments of a layer for the tokens that are left and the keys that it has."""
        new = {**kwargs, "attention_mask": self.mask(layer, kwargs.get("attention_mask"), live)}
        if live is None:
            return new
        new["position_embeddings"] = self.rotation(kwargs["position_embeddings"], live)
        if isinstance(kwargs.get("position_ids"), Tensor):
            new["position_ids"] = self.position_ids(kwargs["position_ids"], live)
        return new

    def mask(self, layer: int, mask: Tensor | None, live: Live | None) -> Tensor | None:
        """A layer's mask, cut to the live tokens and the keys of the layer; layers that share one share the result."""
        check_tensor_mask(mask)
        keys = self.keys(layer)
        fill = (keys is not None and keys.has_fill) or (live is not None and live.has_fill)
        if mask is None and not fill:
            return None
        count, held = self.held(layer)
        name = ("mask", id(mask), id(keys), count, held, id(live))
        if name not in self.memo:
            self.memo[name] = mask, self._cut(mask, layer, (count, held), live, fill)  # an id holds while its object is
        cut: Tensor | None = self.memo[name][1]
        return cut

    def _cut(
        self, mask: Tensor | None, layer: int, held: tuple[int, int], live: Live | None, fill: bool
    ) -> Tensor | None:
        width, total = self.width if live is None else live.width, self.past + self.width
        whole = mask is not None and mask.ndim == 4 and mask.shape[-1] == total and held[0] == held[1]
        if mask is not None and whole and self.plain and width == 1 and not fill:
            return mask[..., -(held[0] + 1) :]  # one token that sees every key, whichever are left
        columns = self.all_slots(layer, live)[:, held[0] - held[1] :]  # (B, K)
        if mask is None:
            if "flash" in self.adapter.kernel:
                return (columns >= 0).long()
            return causal_mask(columns, width, self.adapter.model.dtype)
        # A mask is about the last keys where layers have a sliding window.
        columns = columns - (total - mask.shape[-1])
        cut = gather_mask(
            mask, columns.masked_fill(columns < 0, -1), None if mask.ndim == 2 or live is None else live.index
        )
        return cut  # type: ignore[return-value]

    def rotation(self, tables: tuple[Tensor, Tensor], live: Live) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the live tokens."""
        name = ("rotation", id(tables[0]), id(live))
        if name not in self.memo:
            moved = self.positions.get(id(tables[0]))
            if moved is None:
                made = tuple(live.take(t, t.ndim - 2) for t in tables)
            else:
                made = self.tables[id(tables[0])][1](moved)
            self.memo[name] = tables, made
        rotation: tuple[Tensor, Tensor] = self.memo[name][1]
        return rotation

    def position_ids(self, positions: Tensor, live: Live) -> Tensor:
        """Position ids as attention gets them; flash attention would read gaps in them as packing."""
        name = ("positions", id(positions), id(live))
        if name not in self.memo:
            if "flash" in self.adapter.kernel:
                cut = torch.arange(live.width, device=positions.device).expand(*positions.shape[:-1], -1)
            else:
                cut = live.take(positions, positions.ndim - 1)
            self.memo[name] = positions, cut
        ids: Tensor = self.memo[name][1]
        return ids
