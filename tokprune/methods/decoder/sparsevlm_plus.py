"""SparseVLM+: the raters' attention without what positions alone do to it, by the heads that look at the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.methods.base import check_finite
from tokprune.methods.decoder.sparsevlm import Rated
from tokprune.methods.decoder_base import LayerTokens
from tokprune.methods.options import option
from tokprune.ops.topk import top
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection


def looking_heads(attention: Tensor, count: int) -> Tensor:
    """The `count` heads with the largest sum of attention, ascending. attention: (H, R, V) -> (min(count, H),)."""
    return top(attention.sum((1, 2)), min(count, len(attention)))


def without_gravity(attention: Tensor, gravity: Tensor) -> Tensor:
    """Attention divided by the pull of the positions alone, that of all-ones queries and keys.

    attention: (H, R, V), gravity: (R, V). The pull oscillates far away; where it is not positive, division would turn
    the order round, so the smallest positive pull stands in (1 where there is none).
    """
    positive = torch.where(gravity > 0, gravity, torch.inf)
    least = positive.amin()
    return attention / torch.where(gravity > 0, gravity, torch.where(torch.isfinite(least), least, 1.0))


@register_method(
    "sparsevlm_plus",
    paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    year=2025,
    url="https://arxiv.org/abs/2410.04417",
    complexity="O(TVD)",
    memory="O(HTn)",
    checked=Checked(
        "Gumpest/SparseVLMs",
        agrees="raters, the choice of heads, choice and positions of a stage from attention that is given",
        differs="the division by the pull of positions follows its description, without vectors of it",
    ),
)
@dataclass(frozen=True)
class SparseVLMPlus(Rated):
    """SparseVLM+ (the second version of the code of SparseVLM): as `sparsevlm`, without merging and with its position
    ids kept.

    The raters' attention is divided by the pull of the rotary positions (products of all-ones queries and keys), and
    only the heads (14) that look at the picture most are averaged; of models with fewer heads, all. Without a ratio
    300, 200 and 118 of 576 tokens stay (the setting "192"). Differences from the published code: see
    `without_gravity`; a batch of prompts.
    """

    positions: ClassVar[Literal["keep", "compact"]] = "keep"
    shares: ClassVar[tuple[float, ...]] = (300 / 576, 200 / 576, 118 / 576)
    heads: int = option(14, low=1)

    def relation(self, tokens: LayerTokens) -> Tensor:
        """Corrected attention of raters to candidates, mean over the heads that look. (R, V)"""
        asked = self.asked(tokens)
        seen = tokens.below.weights(asked, "each")[..., tokens.visual]  # (H, R, V)
        seen = check_finite(seen, "the attention of the layer below")
        seen = without_gravity(seen, tokens.below.gravity(asked)[:, tokens.visual])
        return seen[looking_heads(seen, self.heads)].mean(0)

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """The `keep` best by relation."""
        scores = self.relation(tokens).mean(0)
        return Selection(top(scores, keep), info={"scores": scores})
