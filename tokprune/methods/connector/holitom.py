"""HoliTom: the cut into scenes that saves most, still places merged, moving tokens by attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.methods.attended import attended
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.options import Compat, option
from tokprune.ops.cluster import dpc_knn
from tokprune.ops.frames import Pools, earlier, raster, similarity_to, still_and_moving
from tokprune.ops.merge import merged_selection
from tokprune.ops.topk import ranks
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens

NEIGHBOURS = 7  # of DPC-kNN
NEVER = -2.0  # below every cosine: nothing to compare with


def holitom_constancy(similarity: Tensor, lengths: Sequence[int]) -> Tensor:
    """Least similarity of each place between neighbouring frames of a scene. (T, P), row t with t - 1 -> (S, P)."""
    return torch.stack(
        [frames[1:].amin(0) if len(frames) > 1 else frames[0] for frames in similarity.split(list(lengths))]
    )


def holitom_ratio(retain: float, saved: int, tokens: int) -> float:
    """Share to keep of what is left after still places are merged over time, so that `retain` of all tokens stay."""
    return min(retain / ((tokens - saved) / tokens), 1.0)  # in the published order, so that counts round alike


def holitom_counts(groups: Pools, ratio: float) -> Tensor:
    """Tokens of each pool by the published rule: ceil(ratio n) moving ones, round(ratio n) still ones. (T + S,)."""
    frames = len(groups.scene)
    wish = groups.sizes.double() * ratio
    return torch.cat([wish[:frames].ceil(), wish[frames:].round()]).long().minimum(groups.sizes)


def holitom_flow(
    features: Tensor,
    attention: Tensor,
    groups: Pools,
    counts: Tensor,
    beta: float | None = 0.6,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose by attention among the moving tokens of each frame, and cluster the still places of each scene.

    features: (N, C). attention: (N,). counts: (T + S,). A cluster is beta times its centre plus (1 - beta) times the
    mean of its other members; beta None: the plain mean. published: as many neighbours as clusters, at most seven.

    Returns, (T + S, P): the cell that each cell flows into, -1 for none, and its weight there.
    """
    frames, device = len(groups.scene), features.device
    cell = torch.arange(groups.place.shape[1], device=device)
    worth = attention[groups.place.clamp(min=0)].masked_fill(~groups.moving, -torch.inf)
    moving = torch.where(ranks(worth) < counts[:frames, None], cell, -1)
    k = counts[frames:].clamp(1, NEIGHBOURS) if published else NEIGHBOURS
    centre, still, _ = dpc_knn(groups.means(features), counts[frames:], k, groups.still)
    slot = still.clamp(min=0)
    size = features.new_zeros(slot.shape).scatter_add(1, slot, (still >= 0).to(features)).gather(1, slot).clamp(min=1)
    if beta is None:
        weight = 1 / size
    else:
        weight = torch.where(centre, torch.where(size > 1, beta, 1.0), (1 - beta) / (size - 1).clamp(min=1))
    return torch.cat([moving, still]), torch.cat([torch.ones_like(worth), weight])


def static_runs(static: Tensor, longest: int = 1024) -> tuple[list[int], int]:
    """Cut a video so that as many tokens as possible repeat those of the frame before (HoliTom, section 3.2).

    static: (T - 1, P) bool, whether a place looks the same in frames t and t + 1. A segment from s to e saves (e - s)
    tokens for each place that is the same in all of it. Returns the segments' lengths and how many tokens are saved.
    Dynamic programme over the ends of segments, the shortest of equally good ones: O(T (P + T)).
    """
    frames = static.shape[0] + 1
    time = torch.arange(1, frames, device=static.device)[:, None]
    since = time - torch.where(static, 0, time).cummax(0).values  # (T - 1, P) steps up to here without a change
    depth = min(longest, frames)
    steps = torch.zeros(frames - 1, depth + 1, dtype=torch.long, device=static.device)
    steps = steps.scatter_add(1, since.clamp(max=depth), torch.ones_like(since))
    through = steps.flip(-1).cumsum(-1).flip(-1).tolist()  # [e - 1][n]: places that were the same for n steps up to e
    best, choice = [0] * (frames + 1), [1] * (frames + 1)  # of the first i frames
    for i in range(1, frames + 1):
        best[i] = best[i - 1]
        for length in range(2, min(i, longest) + 1):
            saved = through[i - 2][length - 1] * (length - 1)
            if saved == 0:
                break  # a longer segment has no place that is the same throughout either
            if best[i - length] + saved > best[i]:
                best[i], choice[i] = best[i - length] + saved, length
    lengths, i = [], frames
    while i > 0:
        lengths.append(choice[i])
        i -= choice[i]
    return lengths[::-1], best[frames]


@register_method(
    "holitom",
    paper="HoliTom: Holistic Token Merging for Fast Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2505.21334",
    complexity="O(ND + T² + SnnD) for S scenes, n tokens per frame",
    memory="O(ND)",
    merges=True,
    checked=Checked(
        "cokeshao/HoliTom",
        "cuts, counts, clusters and merged tokens on the golden vectors",
        "noise on densities; contextual share (crashes there); its stage inside the LLM",
    ),
)
@dataclass(frozen=True)
class HoliTom(ConnectorMethod):
    """HoliTom (NeurIPS 2025), its outer stage: global cut into scenes, still places merged in time and space, others by
    attention.

    tau: cosine with the frame before, above which a place stands still (0.8; the authors take 0.65 to keep 10 %). The
    scenes are those that together save most tokens (section 3.2, a dynamic programme over scene ends). In each scene
    the still places become their mean over time and are clustered by DPC-kNN; beta: weight of a cluster's centre
    against the mean of its other members (None: plain mean). Each frame's other tokens stay by attention. Merging in
    the LLM (layer 18) is the inner stage.

    What differs from the published code, which compat="published" restores: it rounds pool by pool and misses the
    budget (80 for 75); with one cluster, one neighbour, it leaves the centre to random noise. Here pools share the
    budget in proportion to their sizes, with an exact sum, and seven neighbours count (or all, if fewer). Where the
    pools hold fewer tokens than asked, tau is raised: the least constant places move again. Its contextual share (D) is
    0 by default and crashes otherwise: not offered. The attention map is the stream's own (there: of all videos of a
    batch together). Tokens stay in the order of the stream (there, without newlines: still ones of a scene first).

    A picture or tile is a scene of one frame: the top of its attention.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    tau: float = 0.8
    beta: float | None = option(0.6, above=0, high=1, hint="It weighs a cluster's centre; None is the mean.")
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, attention, layout = attended(tokens, keep)
        place = raster(layout)
        similarity = similarity_to(features, earlier(layout), NEVER)[place.clamp(min=0)].masked_fill(place < 0, NEVER)
        lengths, saved = [1] * layout.num_groups, 0
        if layout.kind == "video":
            lengths, saved = static_runs(similarity[1:] > self.tau)
        constancy = holitom_constancy(similarity, lengths)
        published = self.compat == "published"
        groups = still_and_moving(place, len(tokens), lengths, constancy, self.tau, 0 if published else keep)
        if published:
            counts = holitom_counts(groups, holitom_ratio(keep / len(tokens), saved, len(tokens)))
            keep = int(counts.sum())
        else:
            counts = groups.shares(keep)
        into, weight = holitom_flow(features, attention, groups, counts, self.beta, published)
        return merged_selection(*groups.flow(into, weight), keep, scores=attention, scene=groups.scene[layout.group])
