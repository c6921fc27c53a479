"""TextMonkey's filter: drop the tokens that a later token repeats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ScoreMethod, check_finite
from tokprune.ops import blocks
from tokprune.ops.blocks import whole
from tokprune.ops.similarity import unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens

LAST = 256
"""Rows of which all products are made at once: smaller parts multiply less, but each less efficiently."""


@torch.no_grad()
def uniqueness(features: Tensor) -> Tensor:
    """1 minus the largest cosine with any *later* token, and 3, above all others, for the last. features: (..., N, D)
    -> (..., N).
    """
    return 1 - _likest_later(unit(features))


def _likest_later(rows: Tensor) -> Tensor:
    """Largest product of each row with a later one, -2 for the last. rows: (..., n, D) -> (..., n).

    In halves: the first half with the second at once, then each half by itself; half of the products in all.
    """
    n = rows.shape[-2]
    if n <= LAST or (rows.device.type != "cpu" and whole(n, n)):
        similarity = rows @ rows.mT  # (..., n, n)
        return similarity.masked_fill_(~torch.ones_like(similarity, dtype=torch.bool).triu_(1), -2.0).amax(-1)
    cut = -(-n // 2)
    first, second = rows[..., :cut, :], rows[..., cut:, :]
    beyond = [(part @ second.mT).amax(-1) for part in first.split(blocks.ROWS, -2)]
    return torch.cat([_likest_later(first).maximum(torch.cat(beyond, -1)), _likest_later(second)], -1)


@register_method(
    "textmonkey",
    paper="TextMonkey: An OCR-Free Large Multimodal Model for Understanding Document",
    year=2024,
    url="https://arxiv.org/abs/2403.04473",
    complexity="O(N²D)",
    memory="O(ND)",
    checked=Checked(
        "Yuliang-Liu/Monkey",
        agrees="kept tokens of the similarity filter",
        differs="the trained resampler that follows",
    ),
)
@dataclass(frozen=True)
class TextMonkey(ScoreMethod):
    """TextMonkey (2024), the similarity filter of its token resampler: of similar tokens the last one stays.

    It looks at the projected features only. In the publication the filter picks the queries of a trained perceiver,
    which then attends to all tokens (512 are kept by its default); the filter alone is what works without training.
    Tiles or frames of a stream are one sequence. The last token of the stream always stays.
    """

    def scores(self, tokens: VisualTokens) -> Tensor:
        """How little each token resembles a later one. Returns (N,)."""
        return uniqueness(check_finite(tokens.features, "the visual features"))
