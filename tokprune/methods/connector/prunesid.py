"""PruneSID: group tokens by principal component, then keep the attended and non-redundant ones of each group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Seed
from tokprune.ops.distance import cosine_similarity, unit
from tokprune.ops.lowrank import randomised_pca
from tokprune.ops.ranking import rank_in_group
from tokprune.ops.wide import wide
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


def semantic_groups(features: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Group of each token: the principal component on which it loads most (the paper's PSCA).

    features: (N, C), squashed by a sigmoid; channels are the samples, tokens the variables. Returns (N,) in 0 .. groups-1.
    """
    rank = min(groups, *features.shape)
    return randomised_pca(torch.sigmoid(wide(features)).T, rank, seed).abs().argmax(-1)


@torch.no_grad()
def suppress(features: Tensor, scores: Tensor, group: Tensor, threshold: Tensor, steps: int) -> Tensor:
    """Survivors of non-maximum suppression inside each group.

    In all groups at once, the best token that is left survives and removes those of its group whose cosine with it exceeds
    the threshold; `steps` times, so at most `steps` per group survive. features: (N, C), scores, group: (N,). Returns (N,) bool.
    """
    similarity = cosine_similarity(features)
    n = len(scores)
    place = torch.arange(n, device=scores.device)
    by_order = torch.sort(scores, descending=True, stable=True).indices
    order = torch.empty_like(by_order).scatter(0, by_order, place)  # 0 for the best: unique, so ties are settled
    alive = torch.ones(n, dtype=torch.bool, device=scores.device)
    survives = torch.zeros_like(alive)
    for _ in range(steps):
        best = torch.full((n,), n, device=scores.device).scatter_reduce(0, group, order.masked_fill(~alive, n), "amin")
        winner = best[group]  # (N,) order number of the winner of one's own group, n if the group is used up
        survives |= alive & (winner == order)
        close = similarity[place, by_order[winner.clamp_max(n - 1)]] > threshold
        alive &= (winner != order) & ~close
        if alive.device.type == "cpu" and not alive.any():  # elsewhere the host would have to wait for the answer
            break
    return survives


@torch.no_grad()
def prunesid(features: Tensor, attention: Tensor, keep: int, pictures: int = 1, seed: int = 0) -> Tensor:
    """The whole choice. features: (N, C), attention: (N,) -> (keep,) ascending indices.

    keep // 4 groups; the threshold of suppression is keep / (32 pictures) times the mean cosine of all pairs. Each group's best
    token stays; the rest of the budget goes to the groups in proportion to their survivors, up to 5 ceil(keep / 64) each;
    when survivors run out, the most attended of the others fill up.
    """
    x, attention = wide(features), wide(attention)
    group = semantic_groups(x, max(1, keep // 4), seed)
    redundancy = unit(x).mean(0).square().sum()  # mean cosine of all pairs
    alive = suppress(x, attention, group, redundancy * keep / (32 * pictures), keep)
    rank = rank_in_group(attention.masked_fill(~alive, -torch.inf), group)
    count = torch.zeros(len(x), device=x.device).index_add(0, group, alive.float())[group]
    # Equal shares of a group's survivors come up at equal times (Webster's apportionment): no counts need to reach the host.
    turn = (rank + 0.5) / count.clamp_min(1)
    tier = alive.long() + (alive & (rank < 5 * math.ceil(keep / 64))).long() + (alive & (rank == 0)).long()
    order = torch.sort(attention, descending=True, stable=True).indices  # ties of what follows: the more attended first
    urgency = torch.where(alive, -turn, 0.0)
    order = order[torch.sort(urgency[order], descending=True, stable=True).indices]
    order = order[torch.sort(tier[order], descending=True, stable=True).indices]
    return order[:keep].sort().values


@register_method(
    "prunesid",
    paper="Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity",
    year=2026,
    url="https://arxiv.org/abs/2603.09480",
    complexity="O(N²C + KN)",
    deterministic=False,
)
@dataclass(frozen=True)
class PruneSID(ConnectorMethod):
    """PruneSID (ICLR 2026): principal semantic components for coverage, suppression inside groups against repetition.

    It reads the tower's features before the projector and the [CLS] attention. The principal components come from a random
    projection; `seed` fixes it (the published code draws from the global generator, and two runs keep sets that agree to
    about a half). Its paper varies the budget between images by their redundancy; that is what `adaptive_budget` is for.

    Differences from the published code: exactly `keep` tokens stay, without a [CLS] slot among them; tiles or frames of a
    stream are grouped together (there one by one), with the suppression threshold of a single one; a group that cannot
    fill its share leaves it to the others.
    """

    seed: Seed = 0

    @property
    def needs(self) -> tuple[str, ...]:
        """The tower's features before the projector and its [CLS] attention."""
        return ("encoder_features", "cls_attention")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        features = check_finite(tokens.signal("encoder_features"), "the tower's features")
        attention = check_finite(tokens.signal("cls_attention"), "the [CLS] attention")
        return Selection(prunesid(features, attention, keep, tokens.layout.num_groups, self.seed))
