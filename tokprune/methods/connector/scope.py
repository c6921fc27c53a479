"""SCOPE: a set of tokens that covers the whole image, salient parts first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.ops.blocks import whole
from tokprune.ops.grid import stacks
from tokprune.ops.numeric import wide
from tokprune.ops.select import greedy_coverage, lazy_coverage
from tokprune.ops.similarity import cosine_similarity, unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def scope(features: Tensor, attention: Tensor, keep: int, alpha: float = 1.0) -> Tensor:
    """Greedy choice by saliency times newly covered similarity (section 3 of the paper).

    features: (B, N, C) before the projector. attention: (B, N), not negative; a common factor (heads summed or
    averaged) does not matter. gain_j = attention_j^alpha * sum over i of max(0, cos_ij - cover_i); cover starts at 0,
    so opposite tokens cover nothing of each other. Returns (B, keep) in the order of choice.
    """
    n, weights = features.shape[1], attention**alpha
    if whole(n, n):
        similarity = cosine_similarity(wide(features)).mT  # symmetric: so its columns are the ones that lie together
        return greedy_coverage(similarity, keep, weights=weights)
    numbers = torch.arange(n, device=features.device)
    each = zip(unit(features.detach()), weights, strict=True)
    return torch.stack([lazy_coverage(lambda which, x=x: x[which] @ x.T, numbers, keep, w)[0] for x, w in each])  # type: ignore[misc]


@register_method(
    "scope",
    paper="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
    year=2025,
    url="https://arxiv.org/abs/2510.24214",
    complexity="O(N²C + KN²)",
    memory="O(ND)",
    checked=Checked(
        "kinredon/SCOPE",
        agrees="the order of choice, single pictures and batches",
        differs="shares of tiles are exact here, rounded down there; its additive variant",
    ),
)
@dataclass(frozen=True)
class Scope(ConnectorMethod):
    """SCOPE (NeurIPS 2025): facility location on encoder features, gains weighted by [CLS] attention.

    alpha: power of the attention, 1 as in the code; 0 is coverage alone. Tiles and frames share the budget equally,
    with an exact sum (the published code rounds the share of a tile down). Published and corrected choice are the same,
    so there is no compat mode; the code's additive variant (set by an environment variable that it reads at every pick)
    is left out. When everything is covered, further picks gain nothing and go to the lowest index.
    """

    needs: ClassVar[tuple[str, ...]] = ("encoder_features", "cls_attention")
    alpha: float = option(1.0, low=0)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        features = check_finite(wide(tokens.signal("encoder_features")), "the encoder's features")
        attention = check_finite(wide(tokens.signal("cls_attention")), "the [CLS] attention values")
        sizes = tokens.layout.group_sizes
        chosen = []
        for where, count, _ in stacks(sizes, equal(keep, sizes), attention.device):
            chosen.append(where.gather(1, scope(features[where], attention[where], count, self.alpha)).flatten())
        return Selection(torch.cat(chosen).sort().values, info={"scores": attention})
