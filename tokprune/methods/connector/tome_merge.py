"""ToMe merging in front of the LLM: similar tokens become their mean until the asked number is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import floor_of
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.ops.merge import means, merged_to
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


@torch.no_grad()
def tome_merge(features: Tensor, keep: int, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """Repeat bipartite soft matching until `keep` tokens are left.

    features: (B, N, D). Each round merges at most `share` of the tokens that are left (at least one, and never more
    than half), weighted by how many originals each stands for; the survivors stay in raster order. Returns the
    positions (B, keep) at which they sit, ascending, and (B, N) which of them each original has gone to.
    """
    return merged_to(features, keep, lambda n: min(n - keep, max(1, floor_of(n, share))))[2:]


@register_method(
    "tome_merge",
    paper="Token Merging: Your ViT But Faster",
    year=2023,
    url="https://arxiv.org/abs/2210.09461",
    complexity="O(N²D)",
    memory="O(ND)",
    merges=True,
    checked=Checked(
        "facebookresearch/ToMe",
        agrees="one round of bipartite matching",
        differs="the official code merges inside the tower, by keys",
    ),
)
@dataclass(frozen=True)
class ToMeMerge(ConnectorMethod):
    """ToMe's bipartite soft matching (ICLR 2023, section 3) on the projected features, repeated to an exact count.

    The publication merges inside the vision tower, a few tokens per block, by the similarity of keys (that is the
    encoder stage); here all merging happens behind the projector, by the similarity of the projected features. Each
    output is the plain mean of the originals that went into it and sits where its last destination sat. share: how much
    of what is left one round may merge; ours. A small share takes more rounds and better partners, 0.5 is the published
    maximum per round. All tiles or frames of a stream may merge with each other.
    """

    share: float = option(0.25, above=0, high=0.5, hint="One round can merge at most half of the tokens.")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        features = check_finite(tokens.features, "the visual features")
        rep, assign = (x[0] for x in tome_merge(features[None], keep, self.share))
        sizes = torch.zeros_like(rep).scatter_add(0, assign, torch.ones_like(assign))
        return means(rep, assign, sizes=sizes.float())
