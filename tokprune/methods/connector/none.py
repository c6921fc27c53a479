"""No pruning: the baseline that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokprune.methods.base import ConnectorMethod
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


@register_method("none", paper="baseline: every token stays", complexity="O(N)", memory="O(N)")
@dataclass(frozen=True)
class NoPruning(ConnectorMethod):
    """Keep every token, in order. It ignores the budget: whatever `ratio` or `budget` says, all N tokens stay.

    For the unpruned row of a table, measured through the same code path as all others.
    """

    @property
    def exact(self) -> bool:
        """No: the budget is ignored."""
        return False

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """All tokens of the stream; `keep` is not read."""
        return Selection(torch.arange(len(tokens), device=tokens.features.device))
