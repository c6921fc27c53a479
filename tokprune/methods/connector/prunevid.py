"""PruneVid: scenes; in each, what stands still once, what moves frame by frame, both as a few clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tokprune.budget import floor_of
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.ops.cluster import Distances, centre_scores, dpc_knn, to_centres
from tokprune.ops.frames import Pools, frame_means, raster, run_lengths, still_and_moving
from tokprune.ops.merge import merged_selection
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens

NEIGHBOURS = 7  # of DPC-kNN
SMALL = 14  # the published code clusters only what has more tokens
BLOCK = 16  # frames whose distances are in memory together


def prunevid_scenes(means: Tensor, clusters: int) -> list[int]:
    """Lengths of the scenes: the frames' means in so many clusters, made contiguous. means: (T, C)."""
    return run_lengths(refine(frame_clusters(means, max(1, clusters), NEIGHBOURS).tolist()))


def prunevid_constancy(features: Tensor, place: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean cosine of each place over all pairs of a scene's frames; 0 in scenes of one frame.

    features: (N, C). place: (T, P) positions, -1 for none. Returns (S, P). Linear in the frames: the sum over pairs is
    the squared length of the sum of unit vectors, less the vectors' own.
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

    Returns, (T + S, P): the cell of the centre of each cell's cluster, its weight in the cluster's mean, its score as a
    centre.
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


def frame_clusters(frames: Tensor, clusters: int, k: int = 7) -> Tensor:
    """DPC-kNN of whole frames; clusters are numbered by their centres' scores, best first. frames: (T, C) -> (T,)
    labels.

    O(T² C). With fewer than k frames all of them are neighbours.
    """
    distance = Distances(frames[None])
    best = torch.sort(centre_scores(distance, k)[0], descending=True, stable=True).indices[:clusters]
    centre = torch.zeros(len(frames), dtype=torch.bool, device=best.device).index_fill(0, best, True)
    label = torch.zeros_like(centre, dtype=torch.long).scatter(0, best, torch.arange(len(best), device=best.device))
    return label[to_centres(distance, centre[None])[0]]


def refine(labels: Sequence[int]) -> list[int]:
    """Make clusters of frames contiguous: each keeps its longest run (several of equal length stay), if that is above
    1.

    The gaps in between are filled from left to right, each with the label of the longer of its two neighbouring runs,
    the left one's when they are equally long. Frames that have joined the run on the left count as part of it. If no
    run stays, all frames are label 0.
    """
    spans = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(n for own, n in spans if own == label) for label, _ in spans}
    stays = [label if n == longest[label] > 1 else None for label, n in spans for _ in range(n)]
    spaced = [(label, len(list(run))) for label, run in groupby(stays)]  # None: a gap
    out: list[int] = []
    for (label, n), (right, after) in zip(spaced, [*spaced[1:], (None, 0)], strict=True):
        if label is None:
            left = run_lengths(out)[-1] if out else 0
            label = right if after > left and right is not None else out[-1] if out else 0
        out += [label] * n
    return out


@register_method(
    "prunevid",
    paper="PruneVid: Visual Token Pruning for Efficient Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2412.16117",
    complexity="O(NnD) for n tokens per frame",
    memory="O(ND)",
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

    The frames' means are clustered into `scene_share` as many scenes (section 3.2). Places that look the same
    throughout a scene (mean cosine above tau) become one token each, their mean over time. These, and each frame's
    other tokens, are then clustered by DPC-kNN (k = 7), and each cluster becomes its mean. Question-guided pruning in
    the LLM is the second stage.

    The published count depends on the video: half (cluster_ratio) of each pool of more than 14 tokens. Here the budget
    is given, and pools share it in proportion to their sizes. Where the pools hold fewer tokens than asked, tau is
    raised: the least constant places move again. A budget below the number of pools drops some of them, at even
    distances.

    compat="published" keeps the published counts, whatever the budget. In both, tokens stay in the order of the stream
    (published: by cluster score), a still cluster at its centre's place in the scene's first frame; videos of fewer
    than seven frames use all of them as neighbours (published: an error); equal densities go to the lower index
    (published: to random noise). A picture or tile is a scene of one frame, all moving.
    """

    tau: float = 0.8
    scene_share: float = option(0.25, above=0, high=1)
    cluster_ratio: float = option(0.5, above=0, high=1)
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
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
        return merged_selection(*groups.flow(into, weight), keep, scene=groups.scene[layout.group])
