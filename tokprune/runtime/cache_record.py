"""What a KV cache remembers of a pruned prefill, and how it answers questions about its length.

Outside the multimodal base model lengths are logical (as prompted); inside they are physical (as kept). generate() asks
the cache for the former, mask builders for the latter; the record that links the two rides on the cache object itself,
so that second turns, beams, copies and interleaved generations each carry their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.adapters.foreign import CACHE_RECORD, CACHE_VIEW
from tokprune.adapters.types import CacheClass, KVCache, Mask
from tokprune.errors import TokpruneError, UnsupportedModelError
from tokprune.runtime.decoder.columns import LayerKeys, index_all
from tokprune.runtime.host import to_host
from tokprune.runtime.masks import causal_mask, gather_mask

if TYPE_CHECKING:
    from tokprune.runtime.cache_keys import Chosen


class Reader:
    """Whether the pruning that translates for a cache is still on its model."""

    def __init__(self, active: bool = True) -> None:
        self.active = active

    def __deepcopy__(self, memo: dict[int, Reader]) -> Reader:
        return memo.setdefault(id(self), Reader(self.active))

    def __reduce__(self) -> tuple[type[Reader], tuple[bool]]:
        return Reader, (False,)  # an unpickled cache waits for a pruning that reads it


@dataclass
class PruneState:
    """The link between physical keys and logical prompt columns.

    kept: (B, P) logical column of each physical key, -1 for filler. moves: (B, n_logical + 1) logical minus physical
    position of a text token at each column, and of the next one at last. n_logical: logical length covered by `kept`.
    has_fill: some physical key must stay masked. reader: of the pruning that reads the cache now; without one a model
    would take prompt columns for keys. visual: (B, P) bool, keys of visual tokens (newlines are none), where known.
    chosen: what the cache stage decided last, an object with `index(fn)`.
    next_position: (B,) position that the token after the prompt must have, -1 where none is certain; until it was
    checked. layers: by number, those that hold fewer keys than layer 0, since the decoder stage dropped tokens in front
    of them; physical keys and lengths are those of layer 0.
    """

    kept: Tensor
    moves: Tensor
    n_logical: int
    has_fill: bool
    reader: Reader = field(default_factory=Reader)
    visual: Tensor | None = None
    chosen: Chosen | None = None
    next_position: Tensor | None = None
    layers: dict[int, LayerKeys] = field(default_factory=dict)
    moved: bool = True
    """Whether `moves` of the next token may be anything but 0; a step that knows better subtracts nothing."""
    _places: tuple[Tensor, Tensor] | None = field(init=False, default=None, repr=False)
    """Of `kept`, made in the first step: its columns as they can be gathered, and which are filler."""
    _deepest: tuple[dict[int, LayerKeys], dict[int, LayerKeys]] | None = field(init=False, default=None, repr=False)
    """`layers`, and `deepest` of them."""

    def __deepcopy__(self, memo: dict[int, object]) -> PruneState:
        """A copied cache is read by the same pruning; a copied model has one of its own."""
        return self.index(torch.clone)

    @property
    def deepest(self) -> dict[int, LayerKeys]:
        """Of all `layers` that share a record, the deepest: one layer a record."""
        if self._deepest is None or self._deepest[0] is not self.layers:
            last = {id(keys): i for i, keys in sorted(self.layers.items())}
            self._deepest = self.layers, {i: self.layers[i] for i in last.values()}
        return self._deepest[1]

    @property
    def shift(self) -> Tensor:
        """(B, 1) logical minus physical position of the next text token."""
        return self.moves[:, -1:]

    def moves_until(self, length: int) -> Tensor:
        """(B, length) `moves` of the first columns; tokens that came after the prefill inherit the last move."""
        known = self.moves.shape[1]
        if length <= known:
            return self.moves[:, :length]
        return torch.cat([self.moves, self.shift.expand(-1, length - known)], 1)

    @property
    def removed(self) -> int:
        """Logical minus physical length; one number for the whole batch."""
        return self.n_logical - self.kept.shape[1]

    def index(self, fn: Callable[[Tensor], Tensor]) -> PruneState:
        """The state after `fn` picked or repeated batch rows."""
        return replace(
            self,
            kept=fn(self.kept),
            moves=fn(self.moves),
            visual=None if self.visual is None else fn(self.visual),
            chosen=None if self.chosen is None else self.chosen.index(fn),
            next_position=None if self.next_position is None else fn(self.next_position),
            layers=index_all(self.layers, fn),
        )

    def on_host(self) -> PruneState:
        """A copy of what later turns are planned with, on the host; one wait."""
        visual = [] if self.visual is None else [self.visual]
        kept, moves, *visual = to_host(self.kept, self.moves, *visual)
        return PruneState(kept, moves, self.n_logical, self.has_fill, self.reader, visual[0] if visual else None)

    def count_from(self, first: int) -> None:
        """Let the position that the next token must have, until now counted from 0, count from `first`."""
        if first and (at := self.next_position) is not None:
            self.next_position = torch.where(at >= 0, at + first, at)

    def cropped(self, length: int) -> PruneState:
        """The state after the conversation lost all but its first `length` logical columns.

        Rows may keep different numbers of these columns: what is left over of a row becomes filler.
        """
        if length >= self.n_logical:
            return self
        stay = (self.kept >= 0) & (self.kept < length)
        used = stay.any(0).nonzero()
        width = int(used.max()) + 1 if len(used) else 0
        kept = self.kept.masked_fill(~stay, -1)[:, :width]
        visual = None if self.visual is None else (self.visual & stay)[:, :width]
        has_fill = bool((kept < 0).any())
        layers = {i: keys.cropped(width) for i, keys in self.layers.items()}
        return PruneState(kept, self.moves[:, : length + 1], length, has_fill, self.reader, visual, layers=layers)

    def removed_in(self, layer: int) -> int:
        """Keys that a layer holds fewer than layer 0."""
        keys = self.layers.get(layer)
        return 0 if keys is None else keys.removed

    def shifted(self, positions: Tensor) -> Tensor:
        """Positions as prompted -> as kept, for tokens after the prefill. (B, L), or (axes, B, L)."""
        return positions - self.shift.to(positions.device) if self.moved else positions

    def columns(self, length: int) -> Tensor:
        """(B, length) logical column of every physical key, tokens appended after the prefill included."""
        known = self.kept.shape[1]
        if length <= known:
            return self.kept[:, :length]
        tail = torch.arange(self.n_logical, self.n_logical + length - known, device=self.kept.device)
        return torch.cat([self.kept, tail.expand(self.kept.shape[0], -1)], 1)

    def key_mask(self, logical_mask: Mask, length: int, queries: int = 1, dtype: torch.dtype = torch.float32) -> Mask:
        """The mask over `length` physical keys, the last `queries` of which are new, or None when every key is visible.

        logical_mask: over prompt columns: None, (B, keys) 0/1, (B or 1, H or 1, queries, keys), or a dict of these.
        dtype: of the mask that takes the place of an entry of the dict that is None.
        """
        if logical_mask is None and not self.has_fill:
            return None
        if isinstance(logical_mask, Tensor) and logical_mask.ndim == 2 and length > self.kept.shape[1]:
            return self._step_mask(logical_mask, length)
        columns = self.columns(length)
        if logical_mask is None:
            return (columns >= 0).long()
        causal = causal_mask(columns, queries, dtype) if isinstance(logical_mask, Mapping) and self.has_fill else None
        return gather_mask(logical_mask, columns, causal=causal)

    def _step_mask(self, mask: Tensor, length: int) -> Tensor:
        """As `gather_mask` of a two-dimensional mask, in as few operations as a decode step can do with.

        mask: (B, keys) over prompt columns. length: of the keys, some of them new. Returns (B, length).
        """
        if self._places is None:
            self._places = self.kept.clamp(min=0), self.kept < 0
        at, filler = self._places
        new = length - at.shape[1]
        mask = mask.to(at.device)
        held = mask.gather(1, at)
        held = held.masked_fill(filler, 0) if self.has_fill else held
        keys = torch.cat([held, mask[:, self.n_logical : self.n_logical + new]], 1)
        return keys if keys.dtype == torch.bool else keys.long()


class PrunedCacheMixin:
    """Mixed into the class of a cache that went through a pruned prefill."""

    _tokprune: PruneState
    _tokprune_view: str = "logical"
    _tokprune_base: type

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: generate() slices prompts with it."""
        length: int = super().get_seq_length(layer_idx)  # type: ignore[misc]
        length += self._tokprune.removed_in(layer_idx)
        return length + self._tokprune.removed if self._tokprune_view == "logical" else length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Physical length: every mask builder uses it. One for all layers: the decoder stage cuts masks itself."""
        length: int = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return length + self._tokprune.removed_in(layer_idx)

    def get_mask_sizes(self, *args: object, **kwargs: object) -> tuple[int, int]:
        """Asked for by every forward; the place to refuse a model that is no longer pruned."""
        if not self._tokprune.reader.active:
            raise TokpruneError(
                "this cache was filled by a pruned model, whose pruning has been removed since: prompt columns and "
                "keys no longer match. Apply a pruning again (any can read it), or start with a new cache."
            )
        sizes: tuple[int, int] = super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]
        layer = kwargs.get("layer_idx", args[-1])
        removed = self._tokprune.removed_in(int(layer))  # type: ignore[call-overload]
        if not removed:
            return sizes
        one = self.layers[layer]  # type: ignore[attr-defined]
        if not getattr(one, "is_sliding", False):
            return sizes[0] + removed, sizes[1]
        query, window = sum(sizes) - one.get_seq_length(), one.sliding_window
        total = one.get_seq_length() + removed
        return min(total, window - 1) + query, max(total - window + 1, 0)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickle by the class that the cache had before: this one is made on the fly."""
        return _unpickled, (type(self)._tokprune_base,), self.__dict__

    def reset(self) -> None:
        """Empty the cache and forget the pruning."""
        super().reset()  # type: ignore[misc]
        detach_state(self)

    def crop(self, *args: int, **kwargs: int) -> None:
        """Drop the last n tokens, given as -n: of the prompt and answer as written, pruned ones included."""
        count = int(args[0] if args else next(iter(kwargs.values())))
        if count >= 0:  # nothing, or refused
            super().crop(*args, **kwargs)  # type: ignore[misc]
            return
        held = int(self.get_query_offset())
        logical = max(int(self.get_seq_length()) + count, 0)
        state = self._tokprune.cropped(logical)
        stay = state.kept.shape[1] + logical - state.n_logical
        if state is not self._tokprune and any(getattr(self, "is_linear", ())) and self._tokprune.kept.shape[0] > 1:
            raise UnsupportedModelError(
                "the cache of a model with recurrent layers cannot be cropped back over pictures in a batch: its "
                "prompts lost different tokens. Crop one prompt at a time, or start with a new cache."
            )
        if state is self._tokprune or not state.layers:
            super().crop(stay - held)  # type: ignore[misc]
        for i, layer in enumerate(self.layers if state is not self._tokprune and state.layers else ()):  # type: ignore[attr-defined]
            layer.crop(min(stay - state.removed_in(i) - int(layer.get_seq_length()), 0))
        self._tokprune = state

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch; the record goes along."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._tokprune = self._tokprune.index(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat batch rows; the record goes along."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._tokprune = self._tokprune.index(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick batch rows; the record goes along."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._tokprune = self._tokprune.index(lambda t: t[indices.to(t.device)])


@functools.lru_cache(None)
def _pruned_class(cls: CacheClass) -> CacheClass:
    return type(cls.__name__, (PrunedCacheMixin, cls), {"__module__": cls.__module__, "_tokprune_base": cls})


def _unpickled(cls: CacheClass) -> KVCache:
    """An empty cache of the pruned kind of `cls`, for pickle to fill."""
    pruned = _pruned_class(cls)
    return pruned.__new__(pruned)


def get_state(cache: KVCache) -> PruneState | None:
    """The pruning record of a cache, if it has one."""
    return getattr(cache, CACHE_RECORD, None) if cache is not None else None


def attach_state(cache: KVCache, state: PruneState) -> None:
    """Let `cache` carry `state`. The class of this one object is exchanged; deepcopy keeps both."""
    if not isinstance(cache, PrunedCacheMixin):
        before: CacheClass = type(cache)
        cache.__class__ = _pruned_class(before)
    setattr(cache, CACHE_RECORD, state)


def detach_state(cache: KVCache) -> None:
    """Make `cache` an ordinary cache again."""
    if isinstance(cache, PrunedCacheMixin):
        cache.__class__ = class_before(cache)
        delattr(cache, CACHE_RECORD)
        cache.__dict__.pop(CACHE_VIEW, None)


def class_before(cache: PrunedCacheMixin) -> CacheClass:
    """The class that a pruned cache had before."""
    return type(cache)._tokprune_base


def physical_length(cache: KVCache) -> int:
    """Keys that the cache holds."""
    if cache is None:
        return 0
    return int(cache.get_query_offset() if isinstance(cache, PrunedCacheMixin) else cache.get_seq_length())
