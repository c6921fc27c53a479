"""SparseVLM: the words that look at the picture rate its tokens, and the best of the dropped ones are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens, at_layers
from tokprune.methods.options import Compat, option
from tokprune.ops.cluster import dpc_knn
from tokprune.ops.numeric import wide
from tokprune.ops.topk import top, true_indices
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Merge, Selection

LAYERS = (3, 7, 16)


def rater_scores(visual: Tensor, text: Tensor) -> Tensor:
    """How much each word is what visual tokens look at: softmax over the words of their products, mean over the visual
    tokens. visual: (V, D), text: (T, D) embeddings in front of the LLM -> (T,).
    """
    return (wide(visual) @ wide(text).T).softmax(-1).mean(0)


def raters(scores: Tensor) -> Tensor:
    """Places of the words above the mean, (R,); all of them where none is."""
    found = (scores > scores.mean()).nonzero()[:, 0]
    return found if len(found) else torch.arange(len(scores), device=scores.device)


def recycling(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are looked at again (0.3 of them and one), and how many clusters they become."""
    again = dropped * 3 // 10 + 1
    return (again, again // 10 + 1) if dropped else (0, 0)


def kept_and_merged(n: int, keep: int) -> tuple[int, int]:
    """Split `keep` slots of n tokens: whole tokens k, and clusters of what k leaves, so that the sum is exact.

    The clusters are as many as `recycling` says, at most half of the slots; where two splits fill the slots, the one
    with fewer clusters.
    """
    k = next(k for k in range(keep, -1, -1) if k + min(recycling(n - k)[1], keep // 2) <= keep)
    return k, keep - k


def rank_count(attention: Tensor, scale: float, bias: float) -> int:
    """How many tokens the rank of the raters' attention keeps whole. attention: (R, V), V at least 1."""
    rank = int(torch.linalg.matrix_rank(attention))
    return max(0, min(int(rank * scale + bias), attention.shape[1] - 1))


def cluster_plan(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density peaks (the `clusters` nearest count) and the cluster of each point.

    points: (t, C). Returns the centres (c,), best peak first, and for each point its place among them (t,).
    """
    chosen, into, score = dpc_knn(points[None], torch.tensor([clusters], device=points.device), clusters)
    centres = true_indices(chosen[0], clusters)
    centres = centres[torch.sort(score[0][centres], descending=True, stable=True).indices]
    place = torch.zeros(len(points), dtype=torch.long, device=points.device)
    place[centres] = torch.arange(clusters, device=points.device)
    return centres, place[into[0]]


def sparsevlm(
    hidden: Tensor, relation: Tensor, kept: int, clusters: int, compat: Compat = "corrected"
) -> tuple[Tensor, Merge]:
    """The slots that stay and what flows into them: `kept` tokens by relation, and the recycled ones as means.

    hidden: (V, D) of the visual tokens, relation: (V,) in float32. Returns ascending slots (kept + clusters,) and the
    merge. A mean sits in the slot of its cluster's centre. "published": kept tokens fill the first slots and the means
    the last ones, best peak first, each divided by its size + 1e-6.
    """
    n, device = len(relation), relation.device
    best = top(relation, kept)
    target = torch.full((n,), -1, device=device)
    scale = torch.zeros(n, dtype=torch.float32, device=device)
    scale[best] = 1
    if not clusters:
        target[best] = torch.arange(kept, device=device)
        return best, Merge(target=target, scale=scale)
    stays = torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, best, True)
    rest = true_indices(~stays, n - kept)
    again = rest[torch.sort(relation[rest], descending=True, stable=True).indices[: recycling(n - kept)[0]]]
    centres, into = cluster_plan(wide(hidden[again]), clusters)
    slots, order = torch.cat([best, again[centres]]).sort()
    slot = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    if compat == "published":
        slot = torch.arange(len(order), device=device)
    size = torch.bincount(into, minlength=clusters).float()
    target[best], target[again] = slot[:kept], slot[kept:][into]
    scale[again] = (1 / (size + (1e-6 if compat == "published" else 0)))[into]
    return slots, Merge(target=target, scale=scale)


@dataclass(frozen=True)
class Rated(DecoderMethod):
    """Base of methods in which words rate; raters are chosen once, in front of the first of the layers."""

    reads: ClassVar[tuple[str, ...]] = ("embeddings",)
    counted_below: ClassVar[int] = 1  # layers 2, 6 and 15, whose attention is read
    shares: ClassVar[tuple[float, ...]]
    layers: tuple[int, ...] | None = option(None, low=1, filled=True, example=(3, 7, 16))

    def plan(self, depth: int, share: float | None) -> Schedule:
        layers = at_layers(self.layers, LAYERS, depth)
        if share is not None:
            return Schedule.geometric(layers, share)
        last = len(self.shares) - 1
        return Schedule(tuple((layer, self.shares[min(i, last)]) for i, layer in enumerate(layers)))

    def asked(self, tokens: LayerTokens) -> Tensor:
        """Places of the raters, chosen where the method first sees the prompt. (R,)"""
        if "raters" not in tokens.notes:
            states, text = check_finite(tokens.read("embeddings"), "the embeddings in front of the LLM"), tokens.behind
            tokens.notes["raters"] = tokens.columns[text[raters(rater_scores(states[tokens.visual], states[text]))]]
        return torch.searchsorted(tokens.columns, tokens.notes["raters"])

    def relation(self, tokens: LayerTokens) -> Tensor:
        """Attention of raters to candidates in the layer below, mean over heads. (R, V)"""
        seen = tokens.below.weights(self.asked(tokens))[:, tokens.visual]
        return check_finite(seen, "the attention of the layer below")


@register_method(
    "sparsevlm",
    paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    year=2025,
    url="https://arxiv.org/abs/2410.04417",
    complexity="O(TVD + M²D)",
    memory="O(Tn + VD)",
    merges=True,
    checked=Checked(
        "Gumpest/SparseVLMs",
        agrees='raters, choice, recycling, order and positions of a stage with compat="published"; the rank rule of '
        "its first release",
        differs="the order of merged tokens; 1e-6 of noise in the density; batches, and several pictures",
    ),
)
@dataclass(frozen=True)
class SparseVLM(Rated):
    """SparseVLM (ICML 2025, its version 1.5): at three layers the words that look at the picture choose its tokens.

    Raters are the words behind the last picture whose embeddings visual tokens match above the mean; they are chosen
    once. At each stage the tokens with the most of their attention in the layer below stay; of the others, 0.3 are
    clustered and come back as means, so that a stage of `keep` slots has keep - c whole tokens and c means. positions
    are numbered without gaps.

    layers: in front of which tokens go; 3, 7 and 16 of 32 (the paper counts the layers below), in proportion for other
    depths. Without a ratio 300, 200 and 110 of 576 tokens stay and 9, 4 and 3 means (the setting "192"); with a ratio
    the stages keep equal factors. rank: (scale, bias) of the first release, 13.5 and 0 at "192": without a ratio scale
    times the rank of the raters' attention, plus bias, stay besides the means; an adaptive count. With several pictures
    all their tokens compete, and a mean may hold tokens of two.

    What differs from the published code: a mean lies at its cluster's centre, in raster order, and is an exact mean
    ("published": behind the kept tokens, best peak first, sums divided by size + 1e-6; the two differ in what a causal
    layer lets the tokens see). The density has no random noise (`ops.cluster` says what becomes of ties). Its averages
    (192, 128, 96, 64) count layers 2, 6 and 15 as already pruned; really processed are 206.5, 145.4, 114.1 and 82.2.
    """

    positions: ClassVar[Literal["keep", "compact"]] = "compact"
    shares: ClassVar[tuple[float, ...]] = (309 / 576, 204 / 576, 113 / 576)
    rank: tuple[float, float] | None = option(None, low=0, example=(13.5, 0.0))
    compat: Compat = "corrected"

    @property
    def exact(self) -> bool:
        return self.rank is None

    def plan(self, depth: int, share: float | None) -> Schedule:
        if self.rank is None or share is not None:
            return super().plan(depth, share)
        return Schedule(tuple((layer, 1.0) for layer in at_layers(self.layers, LAYERS, depth)))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """`keep` slots, means among them; by the rank rule, as many as it says."""
        n = len(tokens.visual)
        relation = self.relation(tokens)
        kept, clusters = kept_and_merged(n, keep)
        if self.rank is not None and not tokens.bound and n:
            kept = rank_count(relation, *self.rank)
            clusters = recycling(n - kept)[1]
        hidden = check_finite(tokens.hidden[tokens.visual], "the hidden states")
        scores = relation.mean(0)
        slots, merge = sparsevlm(hidden, scores, kept, clusters, self.compat)
        return Selection(slots, merge if clusters else None, info={"scores": scores})
