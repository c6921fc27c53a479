"""Frames of a video: neighbours in time, cuts into segments, still and moving tokens of each segment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor

from tokprune.budget import equal_spaced, in_proportion
from tokprune.ops.keyframes import middles
from tokprune.ops.similarity import unit
from tokprune.tokens import Layout


def neighbour_similarity(frames: Tensor) -> Tensor:
    """Cosine of each frame with the next. frames: (T, C) -> (T - 1,) in float32 (float64 stays)."""
    rows = unit(frames)
    return (rows[1:] * rows[:-1]).sum(-1)


def left_peaks(values: Tensor) -> Tensor:
    """The value one reaches by walking to the left as long as it does not go down. values: (n,) -> (n,). Linear."""
    n = values.shape[0]
    place = torch.arange(n, device=values.device)
    # Where the walk must stop: the value to the left is lower.
    begins = torch.ones(n, dtype=torch.bool, device=values.device)
    begins[1:] = values[1:] > values[:-1]
    return values[torch.where(begins, place, 0).cummax(0).values] if n else values


def depths(similarity: Tensor, left_only: bool = False) -> Tensor:
    """How deep each similarity lies below the peaks to its sides, (left - c) + (right - c). (n,) -> (n,).

    left_only: below the left peak alone, as a stream allows that has not ended.
    """
    left = left_peaks(similarity) - similarity
    return left if left_only else left + left_peaks(similarity.flip(0)).flip(0) - similarity


def scene_ends(
    depth: Tensor, alpha: float = 0.5, most: int = 15, boundaries: int | None = None, closed: bool = True
) -> list[int]:
    """Last frame of each scene, ascending; the last frame of the video is the last of them.

    depth: (T - 1,). A scene ends where the depth exceeds its mean + alpha * standard deviation (unbiased), at most the
    `most` deepest of such places, ties to the earlier one; or, with boundaries, at so many deepest places whatever
    their depth. closed: False leaves the last frame out unless no scene ended before it (the published streaming
    version).
    """
    n = depth.shape[0]
    if boundaries is not None:
        found = torch.sort(depth, descending=True, stable=True).indices[:boundaries]
    elif n > 1:
        found = (depth > depth.mean() + alpha * depth.std()).nonzero()[:, 0]
        deepest = torch.sort(depth[found], descending=True, stable=True).indices[:most]
        found = found[deepest]
    else:
        found = depth.new_zeros(0, dtype=torch.long)
    ends: list[int] = found.sort().values.tolist()
    return [*ends, n] if closed or not ends else ends


def scene_lengths(ends: Sequence[int]) -> list[int]:
    """Frames of each scene, from the last frames."""
    return [end - start for start, end in zip([-1, *ends[:-1]], ends, strict=True)]


def scenes(frames: Tensor, alpha: float = 0.5, most: int = 15, boundaries: int | None = None) -> list[int]:
    """Lengths of the scenes of a video. frames: (T, C), one vector per frame.

    Similarities are rounded to 1e-5, and there is no boundary without a dip, so that a video that stands still is one
    scene instead of as many as rounding makes of it.
    """
    depth = depths(neighbour_similarity(frames).mul(1e5).round().div(1e5))
    if boundaries is not None:
        boundaries = min(boundaries, int((depth > 0).sum()))
    return scene_lengths(scene_ends(depth, alpha, most, boundaries))


def frames_of_scenes(lengths: Sequence[int], count: int) -> list[int]:
    """`count` different frames, as equally many of each scene as it has, evenly spaced in it. Ascending."""
    out, start = [], 0
    for n, k in zip(lengths, equal_spaced(count, lengths), strict=True):
        out += [start + i for i in middles(n, k)]
        start += n
    return out


def segment_numbers(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Segment number of each frame. lengths: frames of each segment -> (T,) long."""
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(list(lengths), device=device), output_size=sum(lengths)
    )


def by_segment(values: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """A number of each frame, segment by segment. lengths: frames of each segment."""
    frames = iter(values)
    return [list(islice(frames, length)) for length in lengths]


def run_lengths(labels: Sequence[int]) -> list[int]:
    """Lengths of the runs of equal labels."""
    return [len(list(run)) for _, run in groupby(labels)]


def similar_runs(frames: Tensor, cuts: int, threshold: float) -> list[int]:
    """Cut between neighbouring frames at the `cuts` smallest cosines and wherever the cosine is below `threshold`
    (DySeg).

    frames: (T, C), one vector per frame. Returns the lengths of the segments; fewer cuts when there are fewer frames.
    """
    cosine = neighbour_similarity(frames)
    lowest = torch.sort(cosine, stable=True).indices[: max(0, cuts)]
    cut = (cosine < threshold).index_fill(0, lowest, True).long()
    return run_lengths([0, *cut.cumsum(0).tolist()])


class Pools(NamedTuple):
    """Tokens that compete with one another: the moving tokens of a frame, or the still places of a scene, averaged over
    time.

    The T pools of frames come first, then the S of scenes. place: (T, P) positions in the stream, -1 for none. scene:
    (T,) scene of each frame. first, length: (S,) its first frame, how many it has. still: (S, P) bool. moving: (T, P)
    bool. tokens: N of the stream.
    """

    place: Tensor
    scene: Tensor
    first: Tensor
    length: Tensor
    still: Tensor
    moving: Tensor
    tokens: int

    @property
    def sizes(self) -> Tensor:
        """Tokens of each pool, (T + S,)."""
        return torch.cat([self.moving, self.still]).sum(-1)

    @property
    def order(self) -> Tensor:
        """Numbers of the pools in the order of the stream, each scene's still pool ahead of its frames. (T + S,)."""
        frames = torch.arange(len(self.scene), device=self.scene.device)
        return torch.cat([frames * 2 + 1, self.first * 2]).argsort()

    @property
    def home(self) -> Tensor:
        """Position in the stream that stands for each cell of each pool; still ones sit in the scene's first frame. (T
        + S, P).
        """
        return torch.cat([self.place, self.place[self.first]])

    def shares(self, keep: int) -> Tensor:
        """`keep` tokens over the pools, in proportion to their sizes. (T + S,) long."""
        sizes, order = self.sizes, self.order
        return torch.empty_like(sizes).scatter(0, order, in_proportion(keep, sizes[order]))

    def means(self, features: Tensor) -> Tensor:
        """Mean over time of every place of every scene, where its frames all have it. features: (N, C) -> (S, P, C)."""
        out = []
        for place in self.place.split(self.length.tolist()):  # scene by scene: no copy of the whole video
            out.append(features[place.clamp(min=0)].mean(0))
        return torch.stack(out)

    def flow(self, into: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Carry what happens in the pools over to the stream.

        into: (T + S, P) cell of the pool that each cell flows into, -1 for none. weight: (T + S, P), how much of it; a
        still cell's is split over the scene's frames. Returns for each token, (N,), the position that it flows into and
        its weight.
        """
        frames, width = self.place.shape
        goal = torch.where(into >= 0, self.home.gather(1, into.clamp(min=0)), -1)
        share = torch.cat([weight[:frames], weight[frames:] / self.length[:, None]]) * (into >= 0)
        row = torch.where(self.moving, torch.arange(frames, device=into.device)[:, None], frames + self.scene[:, None])
        column = torch.arange(width, device=into.device).expand_as(row)
        # From the raster to the stream: every token has one cell, and holes all go to one more place behind the last.
        count = self.tokens
        spot = torch.where(self.place >= 0, self.place, count).flatten()
        target = torch.empty(count + 1, dtype=torch.long, device=into.device)
        much = torch.empty(count + 1, dtype=share.dtype, device=into.device)
        target = target.scatter(0, spot, goal[row, column].flatten())
        return target[:count], much.scatter(0, spot, share[row, column].flatten())[:count]


def still_and_moving(
    place: Tensor, tokens: int, lengths: Sequence[int], alike: Tensor, threshold: float, at_least: int = 0
) -> Pools:
    """Split every scene into still places and moving tokens.

    place: (T, P) positions in the stream of `tokens`, -1 for none. lengths: frames of each scene. alike: (S, P), how
    constant each place is; still is what lies above `threshold` and is there in all of a scene's frames, of which there
    are at least two. at_least: how many tokens the pools must hold. A still place holds one for all its frames; if that
    is not enough, the least constant places move again (lower place first), as many as it takes.
    """
    present, device = place >= 0, place.device
    scene, length = segment_numbers(lengths, device), torch.tensor(list(lengths), device=device)
    missing = torch.zeros_like(alike, dtype=torch.long).index_add(0, scene, (~present).long())
    still = (alike > threshold) & (missing == 0) & (length > 1)[:, None]
    least = torch.sort(alike.masked_fill(~still, torch.inf).flatten(), stable=True).indices
    gain = ((length - 1)[:, None] * still).flatten()[least]
    held = tokens - gain.sum()
    again = held + gain.cumsum(0) - gain < at_least
    still = still & ~torch.zeros_like(still).flatten().scatter(0, least, again).view_as(still)
    return Pools(place, scene, length.cumsum(0) - length, length, still, present & ~still[scene], tokens)


def raster(layout: Layout) -> Tensor:
    """Position in the stream of the token at each cell of each frame, -1 where a frame has none.

    Returns (T, P) with P = largest height times largest width, cells row by row.
    """
    height, width = max(h for h, _ in layout.grids), max(w for _, w in layout.grids)
    place = (layout.group * height + layout.row) * width + layout.col
    out = torch.full((layout.num_groups * height * width,), -1, dtype=torch.long, device=place.device)
    out = out.scatter(0, place, torch.arange(place.shape[0], device=place.device))
    return out.unflatten(0, (layout.num_groups, height * width))


def earlier(layout: Layout, step: Tensor | int = 1) -> Tensor:
    """Position of the token at the same cell `step` frames before, -1 where there is none.

    step: one number, or (T,) one per frame; 0 means "none". The groups of a picture or of tiles do not follow one
    another in time: -1 for all of them. Returns (N,).
    """
    if layout.kind != "video":
        return torch.full_like(layout.group, -1)
    width = max(w for _, w in layout.grids)
    back = torch.as_tensor(step, device=layout.group.device).expand(layout.num_groups)[layout.group]
    before = layout.group - back
    found = raster(layout)[before.clamp(min=0), layout.row * width + layout.col]
    return torch.where((before >= 0) & (back > 0), found, -1)


def similarity_to(features: Tensor, other: Tensor, missing: float, block: int = 16384) -> Tensor:
    """Cosine of each token with the token at `other`, in float32 (float64 stays); `missing` where that is -1.

    features: (N, D). other: (N,). Taken `block` tokens at a time, so that no second copy of a long video is made.
    """
    parts = []
    for begin in range(0, features.shape[0], block):
        mate = other[begin : begin + block]
        cosine = (unit(features[begin : begin + block]) * unit(features[mate.clamp(min=0)])).sum(-1)
        parts.append(torch.where(mate >= 0, cosine, missing))
    return torch.cat(parts)


def frame_means(features: Tensor, layout: Layout) -> Tensor:
    """Mean of the tokens of each frame, in float32 (float64 stays). features: (N, D) -> (T, D)."""
    wide = features if features.dtype == torch.float64 else features.float()
    total = wide.new_zeros(layout.num_groups, wide.shape[1]).index_add(0, layout.group, wide)
    return total / torch.tensor(layout.group_sizes, device=wide.device).clamp(min=1)[:, None]
