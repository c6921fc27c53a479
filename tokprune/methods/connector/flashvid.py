"""FlashVID: attended and diverse tokens of each frame stay; the others grow into trees through time, then clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokprune.budget import ceil_of, equal_spaced, in_proportion
from tokprune.errors import OptionError
from tokprune.methods.attended import attended, scene_lengths
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.options import Compat, option
from tokprune.ops.cluster import dpc_knn
from tokprune.ops.frames import by_segment, frame_means, raster, segment_numbers
from tokprune.ops.grid import stacks
from tokprune.ops.merge import merged_selection
from tokprune.ops.select import greedy_farthest
from tokprune.ops.similarity import cosine_similarity
from tokprune.ops.topk import rank_in_group
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, Selection, VisualTokens

NEIGHBOURS = 7  # of DPC-kNN, at most
BLOCK = 16  # frames whose distances are in memory together


def flashvid_diverse(features: Tensor, attention: Tensor, keep: int) -> Tensor:
    """Greedy max-min choice on the cosine distance times the attention of the token to be chosen (ADTS, section 3.3).

    features: (B, n, C), attention: (B, n) -> (B, keep) in the order of choice. The first has the largest distance to
    its nearest neighbour, times its attention.
    """
    return greedy_farthest(features, keep, attention)


def scene_relevance(features: Tensor, layout: Layout, lengths: Sequence[int]) -> Tensor:
    """Dot product of each token with the mean over its scene of the frames' means. features: (N, C) -> (N,)."""
    scene = segment_numbers(lengths, features.device)
    means = frame_means(features, layout)
    total = means.new_zeros(len(lengths), means.shape[1]).index_add(0, scene, means)
    centre = total / torch.tensor(list(lengths), device=means.device)[:, None]
    return (features * centre[scene][layout.group]).sum(-1)


def flashvid_links(features: Tensor, free: Tensor, place: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar free token of the frame before, for each free token whose frame before is of the same scene.

    features: (N, C). free: (N,) bool. place: (T, P). scene: (T,). Returns the position, -1 for none, and the cosine,
    both (N,).
    """
    n = features.shape[0]
    partner = torch.full((n + 1,), -1, device=features.device)
    cosine = features.new_full((n + 1,), -torch.inf)
    linked = torch.cat([torch.zeros_like(scene[:1], dtype=torch.bool), scene[1:] == scene[:-1]])
    for frames in torch.arange(1, len(scene), device=features.device).split(BLOCK):
        here, there = place[frames], place[frames - 1]
        able = (here >= 0) & free[here.clamp(min=0)] & linked[frames, None]
        takes = (there >= 0) & free[there.clamp(min=0)]
        alike = cosine_similarity(features[here.clamp(min=0)], features[there.clamp(min=0)])
        best, cell = alike.masked_fill(~takes[:, None, :], -torch.inf).max(-1)
        able = able & torch.isfinite(best)
        spot = torch.where(able, here, n)
        partner = partner.scatter(0, spot.flatten(), there.gather(1, cell).flatten())
        cosine = cosine.scatter(0, spot.flatten(), best.flatten())
    return partner[:n].masked_fill(torch.isinf(cosine[:n]), -1), cosine[:n]


def flashvid_trees(parent: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follow links to the earliest token. parent: (N,), itself where there is none; depth: frames of the longest scene.

    Returns each token's root, and at each root the tokens of its tree and those that are linked to it directly, (N,).
    """
    root = parent
    for _ in range(max(1, math.ceil(math.log2(max(depth, 2))))):
        root = root[root]
    one = torch.ones_like(root)
    size = torch.zeros_like(root).index_add(0, root, one)
    children = torch.zeros_like(root).index_add(
        0, parent, (parent != torch.arange(len(root), device=root.device)).long()
    )
    return root, size, children


class Parts(NamedTuple):
    """How the budget splits."""

    diverse: list[int]
    """(T,) tokens of each frame that stay as they are."""
    merged: list[int]
    """(S,) clusters of each scene."""
    links: list[int]
    """(S,) merges over time, at most."""
    twice: bool = False
    """In scenes of one frame those that stay are clustered, too."""


def flashvid_flow(
    features: Tensor,
    attention: Tensor,
    layout: Layout,
    lengths: Sequence[int],
    parts: Parts,
    threshold: float = 0.8,
    published: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose, link and cluster. features: (N, C), attention: (N,).

    Returns which tokens stay as they are, (N,) bool, and for the others the position of their cluster's centre, -1 for
    none, and their weight there, (N,). published: see `FlashVID`.
    """
    device, n = features.device, features.shape[0]
    place, scene, at = raster(layout), segment_numbers(lengths, device), torch.arange(n, device=device)
    diverse = torch.zeros(n, dtype=torch.bool, device=device)
    for where, keep, _ in stacks(layout.group_sizes, parts.diverse, device):
        for rows in where.split(BLOCK):
            chosen = flashvid_diverse(features[rows], attention[rows], keep)
            diverse = diverse.index_fill(0, rows.gather(1, chosen).flatten(), True)
    merged, most = torch.tensor([parts.merged, parts.links], device=device)
    free = ~diverse
    if parts.twice:
        free = free | (torch.tensor(list(lengths), device=device)[scene] == 1)[layout.group]
    partner, cosine = flashvid_links(features, free, place, scene)
    own = scene[layout.group]
    joins = (cosine > threshold) & (rank_in_group(cosine, own) < most[own])
    root, size, children = flashvid_trees(torch.where(joins, partner, at), max(lengths))
    share = (1 / (1 + children if published else size).to(features))[root]
    trees = torch.zeros_like(features).index_add(0, root, features * share[:, None])
    lives = (place >= 0) & (free & (root == at))[place.clamp(min=0)]
    number = lives.sum(-1)
    if published:
        total = torch.zeros_like(merged).index_add(0, scene, number)
        ratio = merged.double() / total.clamp(min=1)  # float32 would make 13 x 14/26 more than 7
        counts = (number * ratio[scene]).ceil().long().minimum(number)
    else:
        counts = in_proportion(merged, number, scene)
    goal, weight = torch.full((n + 1,), -1, device=device), features.new_zeros(n + 1)
    for cells, count, alive in zip(place.split(BLOCK), counts.split(BLOCK), lives.split(BLOCK), strict=True):
        k = count.clamp(1, NEIGHBOURS) if published else NEIGHBOURS
        _, into, _ = dpc_knn(trees[cells.clamp(min=0)], count, k, alive)
        slot = into.clamp(min=0)
        members = torch.zeros_like(slot).scatter_add(1, slot, (into >= 0).long()).gather(1, slot).clamp(min=1)
        spot = torch.where(alive, cells, n).flatten()
        goal = goal.scatter(0, spot, torch.where(into >= 0, cells.gather(1, slot), -1).flatten())
        weight = weight.scatter(0, spot, (1 / members.to(weight)).flatten())
    gone = ~free
    return diverse, goal[root].masked_fill(gone, -1), (weight[root] * share).masked_fill(gone, 0)


def flashvid_published_parts(per_frame: int, n: int, lengths: Sequence[int], alpha: float) -> Parts:
    """The published split: ceil(alpha b) of the b tokens of each frame stay as they are; merges leave more than b per
    frame.
    """
    diverse, links = math.ceil(alpha * per_frame), []
    for length in lengths:
        most = (n - per_frame) * length
        # Only links above the similarity of the last one within the limit are merged, so that one is missing.
        links.append(max(0, most - 1) if most <= (n - diverse) * (length - 1) else most)
    return Parts([diverse] * sum(lengths), [(per_frame - diverse) * length for length in lengths], links)


def flashvid_parts(sizes: Sequence[int], lengths: Sequence[int], keep: int, alpha: float) -> Parts:
    """The same with an exact sum, for frames of any sizes: scenes share `keep` in proportion to their tokens."""
    own = by_segment(sizes, lengths)
    shares = in_proportion(keep, torch.tensor([sum(scene) for scene in own])).tolist()
    stay = [ceil_of(budget, alpha) for budget in shares]
    diverse = [k for scene, count in zip(own, stay, strict=True) for k in equal_spaced(count, scene)]
    links = [sum(scene) - budget for scene, budget in zip(own, shares, strict=True)]
    return Parts(diverse, [budget - count for budget, count in zip(shares, stay, strict=True)], links)


@register_method(
    "flashvid",
    paper="FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging",
    year=2026,
    video=True,
    url="https://arxiv.org/abs/2602.08024",
    complexity="O(NnD + KNn/T) for n tokens per frame",
    memory="O(ND)",
    merges=True,
    presets={
        "llava_onevision": {"relevance": True},
        "qwen2_5_vl": {"segments": 4},
        "qwen3_vl": {"segments": 4},
    },
    checked=Checked(
        "Fanziyang-v/FlashVID",
        "kept positions with both forms of its token selection, 240 random videos",
        "ties of frames with one or two clusters, which its noise decides; positions that come twice; its stage "
        "inside the LLM",
    ),
)
@dataclass(frozen=True)
class FlashVID(ConnectorMethod):
    """FlashVID (ICLR 2026), its stage before the LLM: diverse attended tokens, trees of alike tokens through time,
    clusters.

    Scenes are cut at the segments - 1 least similar neighbouring frames (of mean tokens) and below the cosine `cut`.
    alpha of the budget are tokens that stay as they are, chosen frame by frame by distance times attention. Each other
    token links to the most similar one of the frame before; links above `threshold` make trees, each of which becomes
    its mean, at its first token; those of a frame are clustered by DPC-kNN. The authors keep 1.25 times the nominal
    ratio here, and drop the rest in layer 20 of the LLM: give that ratio, and put a `decoder` method behind.

    relevance: distances count for as much more as a token's dot product with the mean of its scene is larger. The code
    has both forms, without (its "attn_div", for Qwen) and with ("attn_div_v2", for LLaVA-OneVision and LLaVA-Video);
    the presets name what its scripts use.

    What differs from the published code, which compat="published" restores:
    - counts are rounded up frame by frame (159 tokens for 156); here scenes, frames and clusters share the budget
      exactly;
    - a tree's sum is divided by one more than the links to its root, not by its size, so that a chain of five tokens
      weighs five halves; here it is the mean;
    - with k = min(clusters, 7) neighbours a single cluster has one, and its centre is left to random noise; here k = 7;
    - in scenes of one frame the chosen tokens are clustered once more and positions come twice; never here, in either
      mode.

    A picture or tile is a scene of one frame: chosen tokens, and clusters of the others.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    alpha: float = option(0.7, low=0, high=1)
    segments: int = option(8, low=1)
    cut: float = 0.9
    threshold: float = 0.8
    relevance: bool = False
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, attention, layout = attended(tokens, keep)
        sizes, published = layout.group_sizes, self.compat == "published"
        lengths = scene_lengths(features, layout, self.segments, self.cut)
        if published:
            if len(set(sizes)) > 1:
                raise OptionError("compat='published' knows frames of one size only; use compat='corrected'.")
            parts = flashvid_published_parts(-(-keep // len(sizes)), sizes[0], lengths, self.alpha)
        else:
            parts = flashvid_parts(sizes, lengths, keep, self.alpha)
        worth = attention * scene_relevance(features, layout, lengths) if self.relevance else attention
        diverse, goal, weight = flashvid_flow(features, worth, layout, lengths, parts, self.threshold, published)
        goal = torch.where(diverse, torch.arange(len(goal), device=goal.device), goal)
        weight = weight.masked_fill(diverse, 1.0)
        if published:
            keep = int((goal == torch.arange(len(goal), device=goal.device)).sum())
        return merged_selection(goal, weight, keep, scores=attention, diverse=diverse)
