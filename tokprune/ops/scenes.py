"""Scenes by how deep the similarity of neighbouring frames dips (SceneTilling; VideoLLaMB, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.budget import equal_spaced
from tokprune.ops.distance import unit
from tokprune.ops.keyframes import middles


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
