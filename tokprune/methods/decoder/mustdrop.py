"""MustDrop: a token goes where no word looks at it and all words together hardly do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.budget import ceil_of
from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens, at_layers
from tokprune.methods.options import option
from tokprune.ops.numeric import wide
from tokprune.ops.topk import grouped_top, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


def dual_filter(attention: Tensor, overall: float, single: float) -> Tensor:
    """By which factor both thresholds could fall before a token stays; it goes where this is below 1.

    attention: (R, V) of the words to the visual tokens, mean over heads. A token goes when its sum is below `overall`
    times the sum of all, and its largest single attention is below `single`. Returns (V,); a threshold of 0 never
    lets go.
    """
    total, most = attention.sum(0), attention.amax(0)
    limit = total.sum() * overall
    return torch.maximum(
        torch.where(limit > 0, total / limit, torch.inf), most / single if single else torch.full_like(most, torch.inf)
    )


@register_method(
    "mustdrop",
    paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    year=2024,
    url="https://arxiv.org/abs/2411.10803",
    complexity="O(TV)",
    memory="O(Tn)",
    adaptive=True,
    checked=Checked(
        "liuting20/MustDrop",
        agrees="the filter by both thresholds and the union with the key set",
        differs="position ids of decode steps go on from the prompt's; several pictures; an exact count for a ratio",
    ),
)
@dataclass(frozen=True)
class MustDrop(DecoderMethod):
    """MustDrop (2024), its part in the LLM: two thresholds on the attention of the words behind the picture.

    Behind layers 2, 6, 10 and 14 a token goes when the words' attention to it adds up to less than `overall` of that to
    all, and none gives it `single` (section 3.2 of the paper). The key set always stays: of each picture the
    `key_share` with the most [CLS] attention in the tower's last block. positions are numbered without gaps.

    Without a ratio the thresholds decide, so the count depends on the prompt; the defaults are the published ones of
    "192" on TextVQA ("128": 0.0012 and 0.001, "64": 0.011 and 0.01). They are shares of one picture's 576 tokens and
    drop less where there are fewer. With a ratio the count is exact: both thresholds move by the common factor that
    leaves it, the stages by equal factors, and the key set stays as far as there is room.

    The part in the tower is `mustdrop_merge`. The part in the cache, which cuts the keys of layers 2 to 14 to the
    tokens of the last stage, is a method of the cache stage. layers: in front of which tokens go,
    in proportion for other depths than 32 where they are not given.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention:-1",)
    positions: ClassVar[Literal["keep", "compact"]] = "compact"
    layers: tuple[int, ...] | None = option(None, low=1, filled=True, example=(3, 7, 11, 15))
    overall: float = option(0.001, above=0, hint="Share of all attention.")
    single: float = option(0.001, above=0, high=1, hint="Attention of one word.")
    key_share: float = option(0.08, low=0, high=1)

    def plan(self, depth: int, share: float | None) -> Schedule:
        layers = at_layers(self.layers, (3, 7, 11, 15), depth)
        return Schedule(tuple((layer, 1.0) for layer in layers)) if share is None else Schedule.geometric(layers, share)

    def key_set(self, tokens: LayerTokens) -> Tensor:
        """(V,) bool: candidates of the key set, which is chosen where the method first sees the prompt."""
        if "keys" not in tokens.notes:
            signal = tokens.signal("cls_attention:-1").to(
                tokens.visual.device
            )  # the tower may have a device of its own
            attention = check_finite(wide(signal), "the [CLS] attention values")
            number, sizes = tokens.pictures
            best = grouped_top(attention, number, [ceil_of(n, self.key_share) for n in sizes])
            tokens.notes["keys"] = tokens.columns[tokens.visual[best]]
        return torch.isin(tokens.columns[tokens.visual], tokens.notes["keys"])

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """What the thresholds leave, or exactly `keep` where a count is asked for."""
        seen = tokens.below.weights(tokens.behind)[:, tokens.visual]
        scores = dual_filter(check_finite(seen, "the attention of the layer below"), self.overall, self.single)
        keys = self.key_set(tokens)
        if tokens.bound:
            chosen = top_by_tier(keys.long(), scores, keep)
        else:
            chosen = ((scores >= 1) | keys).nonzero()[:, 0]
        return Selection(chosen, info={"scores": scores})
