"""CATP: for several images in one prompt, share the tokens by what each image still has to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.budget import ceil_of, pooled_budgets
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.methods.question import word_embeddings
from tokprune.ops.blocks import whole
from tokprune.ops.select import greedy_coverage_gains, lazy_coverage
from tokprune.ops.similarity import cosine_similarity, gram, unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


@torch.no_grad()
def catp(features: Tensor, text: Tensor, keep: int, relevance: float = 0.7) -> tuple[Tensor, Tensor]:
    """Greedy choice of a set Y that stands for its image and is close to the text (stage 1 of the paper).

    Maximises sum over tokens x of max over y in Y of sim(x, y), plus relevance * sum over y of sim(y, v), with sim = (1
    + cosine) / 2 and v the mean of the text's embeddings. features: (N, D), text: (T, D). Returns (keep,) indices in
    the order of choice and (keep,) what each added, which only falls.
    """
    rows = unit(features)
    meaning = cosine_similarity(features, text.to(rows.dtype).mean(0, keepdim=True))[:, 0]  # (N,)
    n, bonus = len(rows), relevance * (1 + meaning) / 2
    if not whole(n, n):
        numbers = torch.arange(n, device=rows.device)
        return lazy_coverage(lambda which: (1 + rows[which] @ rows.T) / 2, numbers, keep, bonus=bonus)
    order, gains = greedy_coverage_gains(gram(rows).add_(1).div_(2)[None], keep, bonus=bonus[None])
    return order[0], gains[0]


@register_method(
    "catp",
    paper="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
    year=2026,
    url="https://arxiv.org/abs/2508.07871",
    complexity="O(N²(D + K))",
    memory="O(ND)",
    query_aware=True,
    checked=Checked("", differs="written after the paper; its stage in the LLM"),
)
@dataclass(frozen=True)
class CATP(ConnectorMethod):
    """CATP (AAAI 2026), stage 1: diverse tokens that fit the text, and budgets over the images of one prompt.

    Within an image the choice is the paper's (relevance = lambda_1 = 0.7). text: "question" compares every image with
    the prompt's question; "example", as in the paper, with the words of its own in-context example, those between it
    and the next image (images in a row share them, the last one has the question). Stage 2 of the paper works inside
    the LLM (layers 6 and 7) and belongs to the decoder stage; here the whole budget is spent in front of it.

    Budgets between images: the paper gives each image the same ratio in stage 1 and lets the share of an image vary in
    stage 2. Here, ours, they vary before the LLM: the tokens of all images of the prompt compete by what each adds to
    its own image's objective, so an image gets more when it is more varied, closer to the question or larger. stretch:
    an image never gets more than this multiple of what the common ratio would give it (1 switches the sharing off), and
    at least one token always stays.
    """

    relevance: float = option(0.7, low=0, hint="0 is diversity alone.")
    stretch: float = option(2.0, low=1, hint="1 is the same ratio for all images.")
    text: Literal["question", "example"] = "question"

    @property
    def reads_examples(self) -> bool:
        """Whether `text` asks for the words of each image's own example."""
        return self.text == "example"

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """Share the prompt's tokens between its images by the gain of each further token."""
        if len(batch) < 2 or self.stretch == 1:
            return list(keeps)
        limits = [min(len(t), ceil_of(k, self.stretch)) for t, k in zip(batch, keeps, strict=True)]
        gains = [self._choose(tokens, limit)[1] for tokens, limit in zip(batch, limits, strict=True)]
        return pooled_budgets(gains, sum(keeps))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        return Selection(self._choose(tokens, keep)[0].sort().values)

    def _choose(self, tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor]:
        features = check_finite(tokens.features, "the visual features")
        return catp(features, word_embeddings(tokens), keep, self.relevance)
