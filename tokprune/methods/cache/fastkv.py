"""FastKV: few tokens go on behind one layer, and every layer keeps few keys: two amounts of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.cache_base import CompactMethod, KeptKeys, LayerCache
from tokprune.methods.decoder_base import DecoderMethod, DecoderScores, LayerAttention, LayerTokens, at_layers
from tokprune.methods.options import option
from tokprune.ops.topk import top
from tokprune.registry import Checked, MethodInfo, register_method
from tokprune.schedule import Schedule

PAPER = "FastKV: KV Cache Compression for Fast Long-Context Processing with Token-Selective Propagation"


def observed(attention: LayerAttention, visual: Tensor, n: int, window: int, kernel: int) -> Tensor:
    """(H, V): attention of the prompt's last `window` tokens to each visual one, mean over them, averaged over `kernel`
    neighbours.
    """
    rows = torch.arange(max(n - window, 0), n, device=visual.device)
    seen = attention.weights(rows, "each")[..., visual].mean(1)  # (H, V)
    pooled = torch.nn.functional.avg_pool1d(seen[:, None], kernel, 1, kernel // 2, count_include_pad=False)
    return pooled[:, 0]


@dataclass(frozen=True)
class Propagation(DecoderScores):
    """Token-selective propagation: the tokens that go on behind one layer."""

    info = MethodInfo("fastkv", PAPER, 2025)
    layer: int = 16
    rate: float = 0.2
    window: int = 8
    kernel: int = 7

    def plan(self, depth: int, share: float | None) -> Schedule:
        """One step."""
        return Schedule(((self.layer, self.rate if share is None else share),))

    def scores(self, tokens: LayerTokens) -> Tensor:
        """Mean over all heads of what the last tokens pay in the layer below, (V,)."""
        return observed(tokens.below, tokens.visual, len(tokens.columns), self.window, self.kernel).mean(0)


@register_method(
    "fastkv",
    paper=PAPER,
    year=2025,
    url="https://arxiv.org/abs/2502.01068",
    complexity="O(WND) per layer for the last W tokens",
    memory="O(HWn)",
    checked=Checked("", differs="written after the paper, for visual tokens alone; the published code was not run"),
)
@dataclass(frozen=True)
class FastKV(CompactMethod):
    """FastKV (2025, section 4): tokens are propagated and keys are kept by two amounts of their own.

    Every layer ranks the visual keys by the attention of the prompt's last `window` tokens, pooled over `kernel`
    neighbours, and each key head keeps the best `retention` of them by the mean of its query heads. Behind layer
    `layer` - 1 only the share `propagated` of the visual tokens goes on, by the mean over all heads. retention: 0.1,
    `apply(..., ratio=)` sets it, and 1 lets all go on, too; propagated: 0.2, window 8, kernel 7 and layer 16 of 32 (in
    proportion for other depths) are the paper's settings as far as we know them. A decoder method beside it takes the
    place of the propagation. Ours: text keys always stay (there the window does, and text competes); pooling is by
    the mean.
    """

    layer: int | None = option(None, low=1)
    propagated: float = option(0.2, above=0, high=1)
    retention: float = option(0.1, above=0, high=1)
    window: int = option(8, low=1)
    kernel: int = option(7, low=1, hint="An odd number.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel} of 'fastkv' has no middle; write an odd number, such as kernel=7.")

    def propagation(self, depth: int) -> DecoderMethod | None:
        """The drop behind the layer of propagation."""
        (layer,) = at_layers(self.layer, (16,), depth)
        return Propagation(layer=layer, rate=self.propagated, window=self.window, kernel=self.kernel)

    def compact(self, cache: LayerCache, keep: int) -> KeptKeys:
        """The best of each key head."""
        scores = observed(cache.attention, cache.visual, cache.n, self.window, self.kernel)  # (H, V)
        groups = scores.unflatten(0, (cache.keys.shape[0], -1)).mean(1)  # (H', V)
        return KeptKeys(top(groups, keep))
