"""What a KV cache remembers of a pruned prefill, and how it answers questions about its length.

Outside the multimodal base model lengths are logical (as prompted); inside they are physical (as kept). generate() asks
the cache for the former, mask builders for the latter; the record that links the two rides on the cache object itself, so
that second turns, beams, copies and interleaved generations each carry their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.errors import TokpruneError


class Reader:
    """Whether the pruning that translates for a cache is still on its model."""

    def __init__(self) -> None:
        self.active = True


@dataclass
class PruneState:
    """The link between physical keys and logical prompt columns.

    kept: (B, P) logical column of each physical key, -1 for filler. shift: (B, 1) logical minus physical position of the
    next text token. n_logical: logical length covered by `kept`. has_fill: some physical key must stay masked. reader: of
    the pruning that reads the cache now; without one a model would take prompt columns for keys. visual: (B, P) bool, keys of
    visual tokens (newlines are none), where known. chosen: what the cache stage decided last, an object with `index(fn)`.
    """

    kept: Tensor
    shift: Tensor
    n_logical: int
    has_fill: bool
    reader: Reader = field(default_factory=Reader)
    visual: Tensor | None = None
    chosen: Any = None

    def __deepcopy__(self, memo: Any) -> PruneState:
        """A copied cache is read by the same pruning; a copied model has one of its own."""
        return self.index(torch.clone)

    @property
    def removed(self) -> int:
        """Logical minus physical length; one number for the whole batch."""
        return self.n_logical - self.kept.shape[1]

    def index(self, fn: Callable[[Tensor], Tensor]) -> PruneState:
        """The state after `fn` picked or repeated batch rows."""
        return replace(
            self,
            kept=fn(self.kept),
            shift=fn(self.shift),
            visual=None if self.visual is None else fn(self.visual),
            chosen=None if self.chosen is None else self.chosen.index(fn),
        )

    def cropped(self, length: int) -> PruneState:
        """The state after the cache lost all but its first `length` physical keys."""
        if length >= self.kept.shape[1]:
            return self
        kept = self.kept[:, :length]
        logical = int(kept.max()) + 1 if kept.numel() else 0
        visual = None if self.visual is None else self.visual[:, :length]
        return PruneState(kept, self.shift, logical, self.has_fill, self.reader, visual)

    def columns(self, length: int) -> Tensor:
        """(B, length) logical column of every physical key, tokens appended after the prefill included."""
        known = self.kept.shape[1]
        if length <= known:
            return self.kept[:, :length]
        tail = torch.arange(self.n_logical, self.n_logical + length - known, device=self.kept.device)
        return torch.cat([self.kept, tail.expand(self.kept.shape[0], -1)], 1)

    def key_mask(self, logical_mask: Tensor | None, length: int) -> Tensor | None:
        """2-D mask over `length` physical keys, or None when every key is visible.

        logical_mask: (B, logical length) 0/1 mask over prompt columns, or None.
        """
        if logical_mask is None and not self.has_fill:
            return None
        columns = self.columns(length)
        if logical_mask is None:
            return (columns >= 0).long()
        mask = logical_mask.to(columns.device).gather(1, columns.clamp(min=0))
        return mask.masked_fill(columns < 0, 0)


class PrunedCacheMixin:
    """Mixed into the class of a cache that went through a pruned prefill."""

    _tokprune: PruneState
    _tokprune_view: str = "logical"
    _tokprune_base: type

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: generate() slices prompts with it."""
        length: int = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return length + self._tokprune.removed if self._tokprune_view == "logical" else length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Physical length: every mask builder uses it."""
        length: int = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return length

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """Asked for by every forward; the place to refuse a model that is no longer pruned."""
        if not self._tokprune.reader.active:
            raise TokpruneError(
                "this cache was filled by a pruned model, whose pruning has been removed since: prompt columns and keys no longer "
                "match. Apply a pruning again (any can read it), or start with a new cache."
            )
        return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]

    def physical_length(self, layer_idx: int = 0) -> int:
        """Keys that are really held."""
        return self.get_query_offset(layer_idx)

    def reset(self) -> None:
        """Empty the cache and forget the pruning."""
        super().reset()  # type: ignore[misc]
        detach_state(self)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the last tokens; the record follows when they reach into the prompt."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self._tokprune = self._tokprune.cropped(int(self.physical_length()))

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
def _pruned_class(cls: Any) -> Any:
    return type(cls.__name__, (PrunedCacheMixin, cls), {"__module__": cls.__module__, "_tokprune_base": cls})


def get_state(cache: Any) -> PruneState | None:
    """The pruning record of a cache, if it has one."""
    return getattr(cache, "_tokprune", None) if cache is not None else None


def attach_state(cache: Any, state: PruneState) -> None:
    """Let `cache` carry `state`. The class of this one object is exchanged; deepcopy keeps both."""
    if not isinstance(cache, PrunedCacheMixin):
        kind: Any = type(cache)
        cache.__class__ = _pruned_class(kind)
    cache._tokprune = state


def detach_state(cache: Any) -> None:
    """Make `cache` an ordinary cache again."""
    if isinstance(cache, PrunedCacheMixin):
        cache.__class__ = type(cache)._tokprune_base
        del cache._tokprune
        cache.__dict__.pop("_tokprune_view", None)


def logical_length(cache: Any) -> int:
    """Prompt columns that the cache stands for."""
    return 0 if cache is None else int(cache.get_seq_length())


def physical_length(cache: Any) -> int:
    """Keys that the cache holds."""
    if cache is None:
        return 0
    return int(cache.physical_length() if isinstance(cache, PrunedCacheMixin) else cache.get_seq_length())
