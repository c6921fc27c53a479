"""FitPrune: tokens leave layer by layer, as many as change the attention least, by a table that was fitted before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import floor_of
from tokprune.errors import OptionError
from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderScores, LayerTokens
from tokprune.methods.options import option
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule

TOKENS = 576
DELETED = (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0)
"""Of 576 tokens, how many go in each of the 32 layers: the published table for 60 % less FLOPs."""


def sums(tokens: LayerTokens) -> tuple[Tensor, Tensor]:
    """Attention that each candidate gets in the layer below, the largest of the heads: from the words behind the
    pictures, summed, and from the candidates, summed and divided by their number. Two (V,).
    """
    cross = tokens.below.sums(tokens.behind, "max")[tokens.visual]
    own = tokens.below.sums(tokens.visual, "max")[tokens.visual] / max(len(tokens.visual), 1)
    return cross, own


def deletable(cross: Tensor, own: Tensor, alpha: float) -> int:
    """How many tokens a layer can lose: those among the smallest by both sums whose loss leaves 1 - alpha of each.

    cross, own: (V,) as `sums` gives them.
    """

    def smallest(values: Tensor) -> Tensor:
        values = values.double()
        order = torch.sort(values, stable=True)
        left = values.sum() - order.values.cumsum(0)
        gone = int((left >= (1 - alpha) * values.sum()).sum())
        return torch.zeros_like(values, dtype=torch.bool).index_fill(0, order.indices[:gone], True)

    return int((smallest(cross) & smallest(own)).sum())


def fit(
    statistics: Sequence[Sequence[tuple[Tensor, Tensor]]],
    cost: Callable[[Schedule], float],
    target: float,
    width: float = 0.01,
) -> Schedule:
    """The schedule of the smallest alpha whose cost meets the target, by bisection (section 3.3 of the paper).

    statistics: for each sample, for each layer from 0 on, `sums` of the prompt with all its tokens. cost: of a
    schedule, such as FLOPs relative to the full model. width: of the last interval of alpha.

    A layer loses the mean of what it can lose over the samples, rounded down to whole tokens, and at most what the
    layers before it left. Counts are shares of a sample's own tokens, so that pictures of all sizes fit together.
    """
    if not statistics or not all(len(sample) for sample in statistics):
        raise OptionError("fit() needs the sums of at least one sample in at least one layer.")

    tokens = max(1, round(sum(len(sample[0][0]) for sample in statistics) / len(statistics)))

    def schedule(alpha: float) -> Schedule:
        gone = [[deletable(c, s, alpha) / max(len(c), 1) for c, s in sample] for sample in statistics]
        left, steps = tokens, []
        for layer, shares in enumerate(zip(*gone, strict=True)):
            left = max(0, left - floor_of(tokens, sum(shares) / len(shares)))
            steps.append((layer + 1, left / tokens))
        return Schedule(tuple(steps))

    low, high = 0.0, 1.0
    while high - low > width:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(schedule(middle)) <= target else (middle, high)
    return schedule(high)


@register_method(
    "fitprune",
    paper="Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models",
    year=2025,
    url="https://arxiv.org/abs/2409.10197",
    complexity="O(V²D) a layer",
    memory="O(n)",
    checked=Checked(
        "ywh187/FitPrune",
        agrees="sums and the tokens that go; the table for 60 % less FLOPs",
        differs="its other tables; tokens go behind the layer instead of in front of its MLP, which is the same for "
        "those that stay",
    ),
)
@dataclass(frozen=True)
class FitPrune(DecoderScores):
    """FitPrune (AAAI 2025): in every layer the tokens go that words and other visual tokens look at least.

    Score: attention from the words behind the picture times attention from the visual tokens, each the largest over
    the heads. deleted: tokens that go in each layer, of 576; the default is the published table for 60 % less FLOPs of
    LLaVA-1.5-7B, which ends at 127. The paper counts 231 tokens a layer, each by what it leaves; attention really works
    on 245. In an LLM of other depth the curve of what is left is stretched to its layers. With a ratio all of the curve
    is moved so that it ends there (ours). `fit` makes a schedule from statistics of a few prompts, as published; give
    it as `schedule`. Visual queries are summed in blocks, no full map is held.
    """

    deleted: tuple[int, ...] = option(DELETED, low=0, filled=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < sum(self.deleted) <= TOKENS:
            raise OptionError(f"deleted takes {sum(self.deleted)} of {TOKENS} tokens; it must be 1 to {TOKENS}.")

    def plan(self, depth: int, share: float | None) -> Schedule:
        left = [1.0]
        for gone in self.deleted:
            left.append(left[-1] - gone / TOKENS)
        end = max(left[-1], 0.0)
        stretch = 1.0 if share is None else (1 - share) / (1 - end)
        places = [round(at * len(self.deleted) / depth) for at in range(1, depth)]
        curve = [min(max(1 - (1 - left[place]) * stretch, 0.0), 1.0) for place in places]
        if share is not None:
            curve[-1] = share
        before = [1.0, *curve]
        falls = [(at, value) for at, value in enumerate(curve, 1) if value < before[at - 1]]
        return Schedule(tuple(falls) or ((depth - 1, 1.0),))

    def scores(self, tokens: LayerTokens) -> Tensor:
        cross, own = sums(tokens)
        return check_finite(cross, "the attention of the layer below") * own
