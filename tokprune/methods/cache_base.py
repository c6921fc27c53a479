"""The contracts of cache methods: which visual keys the new token may look at, in each decode step, and which stay in
memory behind the prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import Method
from tokprune.methods.decoder_base import DecoderMethod, LayerAttention
from tokprune.methods.options import option


@dataclass(frozen=True)
class CacheStep:
    """One decision. attention: (B, V) that it was made from. indices: (B, K) visual keys to use, ascending, -1 behind
    them.
    """

    attention: Tensor
    indices: Tensor

    def index(self, fn: Callable[[Tensor], Tensor]) -> CacheStep:
        """The decision after `fn` picked or repeated batch rows, as beam search does."""
        return CacheStep(fn(self.attention), fn(self.indices))


@dataclass(frozen=True)
class CacheMethod(Method):
    """Base of methods that let the decoder's layers read a part of the visual keys and values when it writes an answer.

    Subclasses have a field `layer`: the first decoder layer that reads less; the one below it tells the attention. They
    have a property `share` and implement `step`.
    """

    stage: ClassVar[str] = "cache"
    layer: int = option(3, low=1, hint="The layer below it tells the attention.")

    @property
    def share(self) -> float:
        """Share of the visual keys used in a step, when `apply` gives no ratio to this stage."""
        return 1.0

    def step(self, attention: Tensor, keep: Tensor, width: int, before: CacheStep | None) -> CacheStep:
        """Choose for one new token per row.

        attention: (B, V) in float32, what the new token pays to each visual key in layer `layer - 1`, mean over heads;
        rows with fewer keys than V end in zeros. keep: (B,) keys to use. width: the largest of them. before: the
        decision of the step before, None in the first step of an answer.
        """
        raise OptionError(f"{type(self).__name__} does not implement step(attention, keep, width, before).")


def largest(attention: Tensor, keep: Tensor, width: int) -> Tensor:
    """The keep[b] largest of each row of (B, V) as ascending indices (B, width), -1 behind them; ties to the lower
    index.
    """
    order = torch.sort(attention, dim=-1, descending=True, stable=True).indices[:, :width]
    unused = torch.arange(order.shape[1], device=order.device) >= keep[:, None]
    order = order.masked_fill(unused, attention.shape[1]).sort(-1).values
    return order.masked_fill(order == attention.shape[1], -1)


@dataclass(frozen=True)
class LayerCache:
    """The keys of one prompt in one layer that has just read it; V of them visual, those of this call."""

    layer: int
    """0-based."""
    keys: Tensor
    """(H', V, d), rotated, of the visual tokens."""
    values: Tensor
    """(H', V, d)."""
    attention: LayerAttention
    """Of this layer, over the n tokens of the prompt that it worked on."""
    visual: Tensor
    """(V,) ascending places among the n."""
    n: int
    """Tokens of the prompt in this layer."""


@dataclass(frozen=True)
class KeptKeys:
    """What stays of a layer's visual keys."""

    indices: Tensor
    """(K,) ascending among the V, or (H', K) where each head keeps its own."""
    keys: Tensor | None = None
    """(H', K, d) in place of the keys at `indices`, where keys were merged."""
    values: Tensor | None = None
    """(H', K, d)."""


@dataclass(frozen=True)
class CompactMethod(Method):
    """Base of cache methods that free memory: behind a layer's prefill its visual keys and values are cut to a budget.

    Subclasses have an option `retention` or a property `share`, and implement `compact`. Text is never dropped.
    """

    stage: ClassVar[str] = "cache"
    follows: ClassVar[bool] = False
    """Whether keys go that a decoder method dropped later in the prefill; `compact` is not asked then."""

    @property
    def share(self) -> float:
        """Share of the visual tokens whose keys stay in each layer, when `apply` gives no ratio to this stage: the
        option `retention`, where a method has it.
        """
        return float(getattr(self, "retention", 1.0))

    def propagation(self, depth: int) -> DecoderMethod | None:
        """The method's own drop of tokens inside the LLM, where no decoder method stands beside it."""
        return None

    def compact(self, cache: LayerCache, keep: int) -> KeptKeys:
        """Choose `keep` (1 ... V - 1) of the layer's visual keys."""
        raise OptionError(f"{type(self).__name__} does not implement compact(cache, keep).")
