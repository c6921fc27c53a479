"""FasterVLM: keep what the vision tower's [CLS] token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ScoreMethod
from tokprune.ops.numeric import wide
from tokprune.ops.topk import grouped_top
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens


@register_method(
    "fastervlm",
    paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
    year=2024,
    url="https://arxiv.org/abs/2412.01818v1",
    complexity="O(N log N)",
    memory="O(N)",
    checked=Checked(
        "Theia-4869/FasterVLM",
        agrees="kept tokens, single pictures and batches of tiles",
        differs="padding, which competes there",
    ),
)
@dataclass(frozen=True)
class FasterVLM(ScoreMethod):
    """FasterVLM: the top tokens by [CLS] attention, with equal budgets for all tiles or frames.

    A total that does not divide by the number of tiles gives the first ones one token more; what a tile cut short by
    unpadding cannot take goes to the others. The published code asks each tile for the same absolute number and lets
    padding patches compete.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """[CLS] attention of each token. Returns (N,)."""
        return wide(tokens.signal("cls_attention"))

    def choose(self, tokens: VisualTokens, scores: Tensor, keep: int) -> Tensor:
        """The best of each tile or frame, the budget shared equally."""
        return grouped_top(scores, tokens.layout.group, equal(keep, tokens.layout.group_sizes))
