"""The contract of a cache method that frees memory: which visual keys of a layer stay behind the prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import Method
from tokprune.methods.decoder_base import DecoderMethod, LayerAttention


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

    Subclasses have a property `share` and implement `compact`. Text is never dropped.
    """

    stage: ClassVar[str] = "cache"
    follows: ClassVar[bool] = False
    """Whether keys go that a decoder method dropped later in the prefill; `compact` is not asked then."""

    @property
    def share(self) -> float:
        """Share of the visual tokens whose keys stay in each layer, when `apply` gives no ratio to this stage."""
        return 1.0

    def propagation(self, depth: int) -> DecoderMethod | None:
        """The method's own drop of tokens inside the LLM, where no decoder method stands beside it."""
        return None

    def compact(self, cache: LayerCache, keep: int) -> KeptKeys:
        """Choose `keep` (1 ... V - 1) of the layer's visual keys."""
        raise OptionError(f"{type(self).__name__} does not implement compact(cache, keep).")
