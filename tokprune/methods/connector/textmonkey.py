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


@torch.no_grad()
def uniqueness(features: Tensor) -> Tensor:
    """1 minus the largest cosine with any *later* token, and 3, above all others, for the last. features: (..., N, D)
    -> (..., N).
    """
    rows = unit(features)
    n = rows.shape[-2]
    step = n if rows.device.type != "cpu" and whole(n, n) else min(blocks.ROWS, max(128, n // 8))  # half the products
    likest: list[Tensor] = []
    for part in rows.split(step, -2):
        similarity = part @ rows[..., sum(x.shape[-1] for x in likest) :, :].mT  # (..., m, N - start)
        later = torch.ones(similarity.shape[-2:], dtype=torch.bool, device=rows.device).triu(1)
        likest.append(similarity.masked_fill_(~later, -2.0).amax(-1))
    return 1 - torch.cat(likest, -1)


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
