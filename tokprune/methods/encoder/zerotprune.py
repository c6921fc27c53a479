"""Zero-TPrune: prune by importance in the attention graph and by similarity, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import floor_of, geometric_counts, kept
from tokprune.methods.base import top
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Place, Reduction, at_depths
from tokprune.methods.options import Block, option
from tokprune.ops.similarity import unit
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method


def weighted_page_rank(attention: Tensor, rounds: int, start: Tensor | None = None) -> Tensor:
    """Importance after `rounds` votes, in each of which a token hands its importance on to those it attends to.

    attention: (..., N, N), rows (queries) sum to 1. start: (..., N) importance before the first vote, None for equal
    ones. Returns (..., N) with the sum of `start`, or 1. O(rounds N²).
    """
    if start is None:
        start = torch.full_like(attention[..., 0, :], 1 / attention.shape[-1])
    rank = start.expand(attention.shape[:-1])[..., None, :]
    for _ in range(rounds):
        rank = rank @ attention
    return rank[..., 0, :]


def head_consensus(scores: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Root mean square over heads, so that one head's strong interest counts. scores: (B, H, N), each summing to 1 ->
    (B, N).

    low, high: heads whose scores, scaled to mean 1, vary less than `low` or more than `high` (variance over tokens) are
    left out; when all would be, none is.
    """
    if low is None and high is None:
        return scores.square().mean(-2).sqrt()
    spread = (scores / scores.mean(-1, keepdim=True)).var(-1, correction=0)  # (B, H)
    use = torch.ones_like(spread, dtype=torch.bool)
    use &= spread >= low if low is not None else True
    use &= spread <= high if high is not None else True
    use |= ~use.any(-1, keepdim=True)
    weight = use.to(scores.dtype)[..., None]
    return ((scores.square() * weight).sum(-2) / weight.sum(-2)).sqrt()


def similar_half(importance: Tensor, metric: Tensor, drop: int) -> Tensor:
    """S-stage: of the less important half, drop the tokens most similar to one of the more important half (section
    3.3).

    importance: (B, n), metric: (B, n, d), drop: at most n // 2 -> (B, n - drop) ascending indices.
    """
    n = importance.shape[1]
    ranked = torch.sort(importance, dim=-1, descending=True, stable=True).indices
    more, less = ranked[:, : n - n // 2], ranked[:, n - n // 2 :]
    rows = unit(metric)

    best = (rows_at(rows, less) @ rows_at(rows, more).transpose(1, 2)).amax(-1)
    gone = less.gather(1, torch.sort(best, dim=-1, descending=True, stable=True).indices[:, :drop])
    stay = torch.ones_like(importance, dtype=torch.bool).scatter(1, gone, False)
    return torch.sort(stay.to(torch.int8), dim=-1, descending=True, stable=True).indices[:, : n - drop].sort(-1).values


def importance(attention: Tensor, rounds: int, cls_rows: int, low: float | None, high: float | None) -> Tensor:
    """I-stage scores: PageRank per head, then the consensus of heads. attention: (B, H, N, N) -> (B, N).

    cls_rows: leading rows that start with sqrt(N) times the importance of the others ([CLS] knows what matters).
    """
    n = attention.shape[-1]
    start = attention.new_ones(n)
    start[:cls_rows] = n**0.5
    return head_consensus(weighted_page_rank(attention, rounds, start / start.sum()), low, high)


@register_method(
    "zerotprune",
    paper="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers",
    year=2024,
    url="https://arxiv.org/abs/2305.17328",
    complexity="O(TN² + N²d)",
    memory="O(HN²)",
    checked=Checked(
        "",
        differs="no official code of the method; importance agrees with that of the authors' earlier "
        "Hongjiew/Transformer_pruning, the rest follows the paper",
    ),
)
@dataclass(frozen=True)
class ZeroTPrune(EncoderMethod):
    """Zero-TPrune (CVPR 2024): after a few blocks, similar unimportant tokens go first, then the least important ones.

    blocks: where to prune, at the end of each, 0-based or fractions of the depth. keep: share of patches that each
    leaves; `ratio` or `budget` sets it. similar: share of the tokens to go that the similarity stage takes (dropped,
    not merged). rounds: votes of the PageRank at each of `blocks`, the last number for all further ones; many in early
    blocks, few in deep ones. variance: heads whose scores (scaled to mean 1) vary less or more than this are not asked;
    None asks all. The whole attention matrix of these blocks is computed beside the model's own attention. The authors
    published no code of the method; this follows the paper. The published bounds 0.01 and 0.7 of the variance only make
    sense for scores of mean 1, which is assumed.
    """

    blocks: tuple[Block, ...] = option((0.25, 0.5, 0.75), filled=True)
    keep: float = option(0.8, above=0, high=1)
    similar: float = option(0.3, low=0, high=1)
    rounds: tuple[int, ...] = option((30, 10, 1), low=1, filled=True)
    variance: tuple[float, float] | None = (0.01, 0.7)
    place: ClassVar[Place] = "end"

    def check(self, depth: int, target: bool) -> None:
        at_depths(self.blocks, depth)

    def active(self, index: int, depth: int) -> bool:
        return index in at_depths(self.blocks, depth)

    def reduce(self, block: BlockView) -> Reduction | None:
        blocks, n, prefix = at_depths(self.blocks, block.depth), block.patches, block.prefix
        stage = blocks.index(block.index)
        keep = kept(n, self.keep)
        if block.target is not None:
            keep = geometric_counts(block.start, block.target, len(blocks))[stage]
        if keep >= n:
            return None
        low, high = self.variance or (None, None)
        attention, cls = block.attention(), int(block.cls and prefix > 0)
        first = importance(attention, 1, cls, low, high)[:, prefix:]
        drop = min(floor_of(n - keep, self.similar), n // 2)
        left = similar_half(first, block.metric()[:, prefix:], drop)  # (B, n - drop)
        head = torch.arange(prefix, device=left.device).expand(len(left), -1)
        rows = torch.cat([head, left + prefix], 1)
        width = rows.shape[1]
        graph = attention.gather(2, rows[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3]))
        graph = graph.gather(3, rows[:, None, None, :].expand(-1, graph.shape[1], width, -1))
        graph = graph / graph.sum(-1, keepdim=True)
        rounds = self.rounds[min(stage, len(self.rounds) - 1)]
        chosen = top(importance(graph, rounds, cls, low, high)[:, prefix:], keep)
        return Reduction.kept_patches(block, left.gather(1, chosen))
