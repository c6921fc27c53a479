"""AuroraCap's merging of every frame on its own, in front of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import equal_spaced
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.ops.grid import stacks
from tokprune.ops.merge import merged_selection, merged_to
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens

BLOCK = 64  # frames whose similarities are in memory together


@torch.no_grad()
def auroracap_frames(features: Tensor, keep: int, rounds: int = 24) -> tuple[Tensor, Tensor]:
    """Merge each frame to `keep` tokens by bipartite soft matching, about the same number in every round.

    features: (T, n, C). A merged token is the mean of all originals in it. Returns the positions that are left in each
    frame (T, keep), ascending, and to which of them each original went (T, n). Rounds are added where matching, which
    can merge at most half of the tokens at once, would fall short.
    """
    left = iter(range(rounds, 0, -1))
    return merged_to(features, keep, lambda n: -((keep - n) // next(left, 1)))[2:]


@register_method(
    "auroracap_frames",
    paper="AuroraCap: Efficient, Performant Video Detailed Captioning and a New Benchmark",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2410.03051",
    complexity="O(NnD) for n tokens per frame",
    memory="O(ND)",
    merges=True,
    checked=Checked(
        "rese1f/aurora",
        agrees="its rule: frames alone, the same number per round, means weighted by size (the rounds themselves are "
        "ToMe's)",
        differs="it merges inside the tower, by keys; counts are exact here, truncated there; order of the tokens",
    ),
)
@dataclass(frozen=True)
class AuroraCapFrames(ConnectorMethod):
    """AuroraCap's (ICLR 2025) token merging over frames: ToMe on each frame alone, the same number of tokens per round.

    The publication merges inside the vision tower, a constant number per block, by the similarity of keys: that is the
    encoder method `auroracap`, which also saves work in the tower. Here the same recipe runs behind the projector, on
    projected features, for towers that cannot be opened and for exact budgets. rounds: how many the merging is spread
    over (24, the blocks of the tower); few large rounds take worse partners. Frames share the budget equally, odd
    tokens at even distances; a budget below one token per frame drops frames. Tokens stay in raster order (published:
    unmerged ones first). Tiles count as frames.
    """

    rounds: int = option(24, low=1)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        features = check_finite(tokens.features.detach(), "the visual features")
        sizes = tokens.layout.group_sizes
        target = torch.full((len(tokens),), -1, device=features.device)
        weight = torch.zeros(len(tokens), dtype=torch.float32, device=features.device)
        for where, count, _ in stacks(sizes, equal_spaced(keep, sizes), features.device):
            for rows in where.split(BLOCK):
                rep, assign = auroracap_frames(features[rows], count, self.rounds)
                members = torch.zeros_like(rep).scatter_add(1, assign, torch.ones_like(assign))
                target[rows] = rows.gather(1, rep.gather(1, assign))
                weight[rows] = 1 / members.gather(1, assign).float()
        return merged_selection(target, weight, keep)
