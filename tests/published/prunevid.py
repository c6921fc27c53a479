"""PruneVid as its authors run it: the tokens in their order, and the choice inside the LLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.methods.connector.prunevid import prunevid_clusters, prunevid_constancy, prunevid_counts, prunevid_scenes
from tokprune.ops.frames import still_and_moving
from tokprune.ops.numeric import wide
from tokprune.tokens import Merge


def prunevid(
    features: Tensor, tau: float = 0.8, scene_share: float = 0.25, cluster_ratio: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The published first stage. features: (T, N, C).

    Returns the merged tokens (K, C) in the published order (scene by scene the still ones, then each frame's; clusters
    by score, best first), how many each scene has of the still and of the moving ones, and the scenes' lengths.
    """
    frames, n, _ = features.shape
    x = wide(features).flatten(0, 1)
    place = torch.arange(frames * n, device=x.device)
    lengths = prunevid_scenes(wide(features).mean(1), int(frames * scene_share))
    raster_of = place.unflatten(0, (frames, n))
    groups = still_and_moving(raster_of, frames * n, lengths, prunevid_constancy(x, raster_of, lengths), tau)
    counts = prunevid_counts(groups, cluster_ratio)
    into, weight, score = prunevid_clusters(x, groups, counts)
    target, much = groups.flow(into, weight)
    # Tokens in the order in which they leave: pool after pool, clusters by score where there are clusters, else in
    # place.
    cell = torch.arange(n, device=x.device)
    rank = torch.where((counts < groups.sizes)[:, None], -score, cell.to(score))[groups.order]
    centre = (into == cell)[groups.order]
    home = groups.home[groups.order].gather(1, torch.sort(rank, stable=True).indices)
    home = home[centre.gather(1, torch.sort(rank, stable=True).indices)]
    row = torch.empty_like(target).scatter(0, home, place[: len(home)])
    out = Merge(target=torch.where(target >= 0, row[target.clamp(min=0)], -1), scale=much).apply(x, len(home))
    moving = torch.zeros_like(groups.length).index_add(0, groups.scene, counts[:frames])
    return out, counts[frames:], moving, lengths


def prunevid_second_stage(attention: Tensor, groups: Sequence[int], alpha: float = 0.4) -> Tensor:
    """Which of the merged tokens the LLM goes on with: int(alpha n) of each group, by the question's attention (section
    3.3).

    attention: (heads, text, K) of one layer, from the words behind the video to the video. groups: sizes of the runs of
    tokens
    that compete, in order: each scene's still ones and each frame's. Returns ascending indices.
    """
    kept, begin = [], 0
    for worth in attention.amax((0, 1)).split(list(groups)):
        best = torch.sort(worth, descending=True, stable=True).indices[: int(alpha * len(worth))]
        kept.append(best.sort().values + begin)
        begin += len(worth)
    return torch.cat(kept)
