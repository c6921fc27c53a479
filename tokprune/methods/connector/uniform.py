"""Uniform choice: a regular grid over the picture, the baseline that knows nothing of its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokprune.budget import share
from tokprune.methods.base import ConnectorMethod, check_keep
from tokprune.ops.grid import centres, even_cells
from tokprune.registry import register_method
from tokprune.tokens import Layout, Selection, VisualTokens


def uniform(layout: Layout, budgets: Sequence[int]) -> Tensor:
    """budgets[g] tokens of each group g, spread evenly over its rows and columns. Returns ascending indices (sum,)."""
    return centres(even_cells(layout, budgets), sum(budgets), layout).sort().values


@register_method("uniform", paper="baseline: a regular grid of tokens", complexity="O(N log N)", memory="O(N)")
@dataclass(frozen=True)
class Uniform(ConnectorMethod):
    """Keep a regular grid of tokens: each group is cut into equal near-square cells, and the middle of each cell stays.

    Tiles and frames share the budget in proportion to their tokens; the count is exact for every N and every budget,
    and holes left by unpadding are respected.
    """

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        sizes = tokens.layout.group_sizes
        return Selection(uniform(tokens.layout, share(keep, sizes, sizes)).to(tokens.features.device))
