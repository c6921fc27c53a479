"""VisPruner: half of the tokens by attention, the other half by throwing duplicates out of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.ops.grid import stacks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import cosine_similarity
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def vispruner(features: Tensor, attention: Tensor, keep: int, important_ratio: float = 0.5, step: int = 8) -> Tensor:
    """Important tokens first, then diverse ones (sections 3.2 and 3.3 of the paper).

    features: (B, N, C) before the projector. attention: (B, N). The int(keep * important_ratio) best by attention stay.
    Of the others, in order of attention, every round compares the even places with the odd ones and drops the `step`
    even ones that have the most similar partner; survivors go to the front, most similar first. Returns (B, keep),
    ascending.
    """
    order = torch.sort(attention, dim=-1, descending=True, stable=True).indices
    important = int(keep * important_ratio)
    diverse = keep - important
    if diverse == 0:
        return order[:, :keep].sort(-1).values
    similarity = cosine_similarity(wide(features))
    batch = torch.arange(order.shape[0], device=order.device)[:, None, None]
    rest = order[:, important:]
    while (surplus := rest.shape[1] - diverse) > 0:
        even, odd = (
            rest[:, 0::2],
            rest[:, 1::2],
        )  # an odd length leaves the last even place without a neighbour, not a crash
        likeness = similarity[batch, even[:, :, None], odd[:, None, :]].amax(-1)
        drop = min(step, surplus, even.shape[1])
        ranked = torch.sort(likeness, dim=-1, descending=True, stable=True).indices
        rest = torch.cat([even.gather(1, ranked[:, drop:]), odd], dim=1)
    return torch.cat([order[:, :important], rest], dim=1).sort(-1).values


@register_method(
    "vispruner",
    paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
    year=2025,
    url="https://arxiv.org/abs/2412.01818",
    complexity="O(N²C + (N - K)N²)",
    memory="O(N²)",
    checked=Checked(
        "Theia-4869/VisPruner",
        agrees="kept tokens wherever it runs",
        differs="odd numbers of residual tokens, at which it stops with an error",
    ),
)
@dataclass(frozen=True)
class VisPruner(ConnectorMethod):
    """VisPruner (ICCV 2025): important tokens by [CLS] attention, diverse tokens by removing near-duplicates.

    important_ratio: share of the budget given by attention (0.5 is the scripts' default, 0.75 is used too). step:
    duplicates dropped per round, 8 as published. Tiles and frames get equal budgets, as published. Each of some N / 8
    rounds pairs the survivors anew, so that the similarities of all pairs are held whatever the size: made again in
    every round they would take O(N³D).

    What differs from the published code: it crashes when an odd number of residual tokens is reached (58 of 576 at
    0.5), or when more are to go than there are even places; it takes one image at a time and compares in the model's
    dtype. Where it runs, both choose the same tokens, so there is no compat mode.
    """

    needs: ClassVar[tuple[str, ...]] = ("encoder_features", "cls_attention")
    important_ratio: float = option(0.5, low=0, high=1)
    step: int = option(8, low=1)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        features = check_finite(wide(tokens.signal("encoder_features")), "the encoder's features")
        attention = check_finite(wide(tokens.signal("cls_attention")), "the [CLS] attention values")
        sizes = tokens.layout.group_sizes
        chosen = []
        for where, count, _ in stacks(sizes, equal(keep, sizes), attention.device):
            local = vispruner(features[where], attention[where], count, self.important_ratio, self.step)
            chosen.append(where.gather(1, local).flatten())
        return Selection(torch.cat(chosen).sort().values, info={"scores": attention})
