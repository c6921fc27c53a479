"""Average pooling: neighbouring tokens become one, the classic that every pruner is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tokprune.budget import share
from tokprune.methods.base import ConnectorMethod, check_keep
from tokprune.methods.options import option
from tokprune.ops.grid import centres, even_cells, even_runs, middles
from tokprune.registry import Checked, register_method
from tokprune.tokens import Merge, Selection, VisualTokens


@register_method(
    "pool",
    paper="LLaVolta: Efficient Multi-modal Models via Stage-wise Visual Context Compression",
    year=2024,
    url="https://arxiv.org/abs/2406.20092",
    complexity="O(ND)",
    memory="O(ND)",
    merges=True,
    checked=Checked(
        "Beckschen/LLaVolta",
        agrees="means and positions for strides that divide the picture",
        differs="positions above 2,048, which it averages in float16; the tail that no window fills",
    ),
)
@dataclass(frozen=True)
class Pool(ConnectorMethod):
    """Average pooling as in LLaVolta (NeurIPS 2024), here in front of the LLM, with an exact budget instead of a
    stride.

    dims=1 (the paper's): the raster sequence is cut into `keep` windows whose lengths differ by at most one; with a
    budget that divides N this is pooling with that stride. dims=2: near-square cells of the grid. Each mean takes the
    place of the token in the middle of its window. Tiles and frames share the budget in proportion to their tokens, and
    no window straddles two of them; a group that gets nothing (fewer tokens asked than groups) is dropped.

    The published code averages positions in float16, so that those above 2048 are off; here they are exact.
    """

    dims: Literal[1, 2] = option(1, hint="1: windows along the raster, 2: cells of the grid.")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Pool the stream to `keep` tokens."""
        check_keep(keep, len(tokens))
        layout = tokens.layout
        budgets = share(keep, layout.group_sizes, layout.group_sizes)
        if self.dims == 1:
            cell = even_runs(layout, budgets)
            middle = middles(cell, keep)
        else:
            cell = even_cells(layout, budgets)
            middle = centres(cell, keep, layout)
        indices, order = middle.sort()
        slot = torch.empty_like(order).scatter(0, order, torch.arange(keep, device=order.device))
        inside, cell = cell >= 0, cell.clamp(min=0)
        size = torch.zeros(keep, dtype=torch.float32, device=cell.device).index_add(0, cell, inside.float())
        target, scale = torch.where(inside, slot[cell], -1), inside / size[cell]
        device = tokens.features.device
        return Selection(indices.to(device), Merge(target=target.to(device), scale=scale.to(device)))
