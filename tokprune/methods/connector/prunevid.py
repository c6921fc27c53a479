"""PruneVid: scenes; in each, what stands still once, what moves frame by frame, both as a few clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import floor_of
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.ops.distance import unit
from tokprune.ops.dpc import dpc_knn
from tokprune.ops.frames import frame_means, raster
from tokprune.ops.pools import Pools, selection, still_and_moving
from tokprune.ops.segments import frame_clusters, refine, runs
from tokprune.ops.wide import wide
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens

NEIGHBOURS = 7  # of DPC-kNN
SMALL = 14  # the published code clusters only what has more tokens
BLOCK = 16  # frames whose distances are in memory together


def prunevid_scenes(means: Tensor, clusters: int) -> list[int]:
    """Lengths of the scenes: the frames' means in so many clusters, made contiguous. means: (T, C)."""
    return runs(refine(frame_clusters(means, max(1, clusters), NEIGHBOURS).tolist()))


def prunevid_constancy(features: Tensor, place: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean cosine of each place over all pairs of a scene's frames; 0 in scenes of one frame.

    features: (N, C). place: (T, P) positions, -1 for none. Returns (S, P). Linear in the frames: the sum over pairs is the
    squared length of the sum of unit vectors, less the vectors' own.
    """
    out = []
    for frames in place.split(list(lengths)):
        rows = unit(features[frames.clamp(min=0)])
        pairs = max(1, len(frames) * (len(frames) - 1))
        out.append((rows.sum(0).square().sum(-1) - rows.square().sum((0, 2))) / pairs)
    return torch.stack(out)


def prunevid_counts(groups: Pools, cluster_ratio: float = 0.5) -> Tensor:
    """Clusters of each pool by the published rule: int(ratio n), or all n where there are at most 14. (T + S,)."""
    sizes = groups.sizes
    return torch.where(sizes > SMALL, (sizes.double() * cluster_ratio).long(), sizes)


def prunevid_clusters(features: Tensor, groups: Pools, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster each pool into counts[pool] clusters. features: (N, C), counts: (T + S,).

    Returns, (T + S, P): the cell of the centre of each cell's cluster, its weight in the cluster's mean, its score as a centre.
    """
    frames = len(groups.scene)
    found = [
        dpc_knn(features[place.clamp(min=0)], count, NEIGHBOURS, valid)
        for place, count, valid in zip(
            groups.place.split(BLOCK), counts[:frames].split(BLOCK), groups.moving.split(BLOCK), strict=True
        )
    ]
    found.append(dpc_knn(groups.means(features), counts[frames:], NEIGHBOURS, groups.still))
    into, score = (torch.cat([f[i] for f in found]) for i in (1, 2))
    size = torch.zeros_like(score).scatter_add(1, into.clamp(min=0), (into >= 0).to(score))
    return into, 1 / size.gather(1, into.clamp(min=0)).clamp(min=1), score


@register_method(
    "prunevid",
    paper="PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2412.16117",
    complexity="O(NnD) for n tokens per frame",
    merges=True,
    checked=Checked(
        "Visual-AI/PruneVid",
        "segments after refinement (20,000 random labels), merged tokens and second stage on the golden vectors",
        "the order of tokens; noise on densities; its stage inside the LLM",
    ),
)
@dataclass(frozen=True)
class PruneVid(ConnectorMethod):
    """PruneVid (ACL Findings 2025), its first stage: scenes, still and moving tokens, clusters.

    The frames' means are clustered into `scene_share` as many scenes (section 3.2). Places that look the same throughout a
    scene (mean cosine above tau) become one token each, their mean over time. These, and each frame's other tokens, are then
    clustered by DPC-kNN (k = 7), and each cluster becomes its mean. Question-guided pruning in the LLM is the second stage.

    The published count depends on the video: half (cluster_ratio) of each pool of more than 14 tokens. Here the budget is
    given, and pools share it in proportion to their sizes. Where the pools hold fewer tokens than asked, tau is raised:
    the least constant places move again. A budget below the number of pools drops some of them, at even distances.

    compat="published" keeps the published counts, whatever the budget. In both, tokens stay in the order of the stream (published:
    by cluster score), a still cluster at its centre's place in the scene's first frame; videos of fewer than
    seven frames use all of them as neighbours (published: an error); equal densities go to the lower index (published: to
    random noise). A picture or tile is a scene of one frame, all moving.
    """

    tau: float = 0.8
    scene_share: float = option(0.25, above=0, high=1)
    cluster_ratio: float = option(0.5, above=0, high=1)
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Merge the stream to `keep` tokens."""
        check_keep(keep, len(tokens))
        features = check_finite(wide(tokens.features), "the visual features")
        layout = tokens.layout.to(features.device)
        lengths = [1] * layout.num_groups
        if layout.kind == "video":
            frames, share = layout.num_groups, self.scene_share
            clusters = int(frames * share) if self.compat == "published" else floor_of(frames, share)
            lengths = prunevid_scenes(frame_means(features, layout), clusters)
        place = raster(layout)
        constancy = prunevid_constancy(features, place, lengths)
        if self.compat == "published":
            groups = still_and_moving(place, len(tokens), lengths, constancy, self.tau)
            counts = prunevid_counts(groups, self.cluster_ratio)
            keep = int(counts.sum())
        else:
            groups = still_and_moving(place, len(tokens), lengths, constancy, self.tau, keep)
            counts = groups.shares(keep)
        into, weight, _ = prunevid_clusters(features, groups, counts)
        return selection(*groups.flow(into, weight), keep, scene=groups.scene[layout.group])
