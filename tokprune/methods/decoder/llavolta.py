"""LLaVolta: neighbouring visual tokens become their mean at one layer of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokprune.budget import share as share_of
from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.methods.options import option
from tokprune.ops.grid import even_runs, middles
from tokprune.ops.merge import means
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Layout, Selection


@register_method(
    "llavolta",
    paper="LLaVolta: Efficient Multi-modal Models via Stage-wise Visual Context Compression",
    year=2024,
    url="https://arxiv.org/abs/2406.20092",
    complexity="O(VD)",
    memory="O(V)",
    merges=True,
    checked=Checked(
        "Beckschen/LLaVolta",
        agrees="means and positions for strides that divide the picture",
        differs="positions above 1,024, which it averages in float16; the tail that no window fills",
    ),
)
@dataclass(frozen=True)
class LLaVolta(DecoderMethod):
    """LLaVolta's pooling (NeurIPS 2024): at layer 2 windows of the raster sequence become their means.

    `keep` windows whose lengths differ by at most one; with a count that divides the tokens this is pooling with that
    stride. A mean has the position id of the token in the middle of its window: the mean of the window's ids, rounded
    down, as published. Pictures share the count by their size, and no window straddles two. Without a ratio
    stride 8, the first stage of the published training. The paper trains with pooling and answers without; on a
    model that was not trained so, it is a baseline. The method `pool` does the same in front of the LLM.

    The published code averages ids in float16, so that those above 1024 may be off, and drops a tail that does not fill
    a window.
    """

    layer: int = option(2, low=1)

    def plan(self, depth: int, share: float | None) -> Schedule:
        return Schedule(((self.layer, 1 / 8 if share is None else share),))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """`keep` windows."""
        if not keep:
            return Selection(tokens.visual[:0])
        check_finite(tokens.hidden[tokens.visual], "the hidden states")
        number, sizes = tokens.pictures
        row = torch.zeros_like(number)
        layout = Layout(number, row, row, tuple((1, size) for size in sizes))
        cell = even_runs(layout, share_of(keep, sizes, sizes))  # (V,)
        return means(middles(cell, keep), cell)
