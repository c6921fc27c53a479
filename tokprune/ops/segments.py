"""Scenes of a video: runs of frames that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from tokprune.ops.distance import unit
from tokprune.ops.dpc import euclidean, peaks, to_centres


def numbers(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Segment number of each frame. lengths: frames of each segment -> (T,) long."""
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(list(lengths), device=device), output_size=sum(lengths)
    )


def runs(labels: Sequence[int]) -> list[int]:
    """Lengths of the runs of equal labels."""
    return [len(list(run)) for _, run in groupby(labels)]


def similar_runs(frames: Tensor, cuts: int, threshold: float) -> list[int]:
    """Cut between neighbouring frames at the `cuts` smallest cosines and wherever the cosine is below `threshold` (DySeg).

    frames: (T, C), one vector per frame. Returns the lengths of the segments; fewer cuts when there are fewer frames.
    """
    count = frames.shape[0]
    rows = unit(frames)
    cosine = (rows[1:] * rows[:-1]).sum(-1)
    lowest = torch.sort(cosine, stable=True).indices[: max(0, min(cuts, count - 1))]
    cut = (cosine < threshold).index_fill(0, lowest, True).long()
    return runs([0, *cut.cumsum(0).tolist()])


def frame_clusters(frames: Tensor, clusters: int, k: int = 7) -> Tensor:
    """DPC-kNN of whole frames; clusters are numbered by their centres' scores, best first. frames: (T, C) -> (T,) labels.

    O(T² C). With fewer than k frames all of them are neighbours.
    """
    distance = euclidean(frames[None])
    best = torch.sort(peaks(distance, k)[0], descending=True, stable=True).indices[:clusters]
    centre = torch.zeros(len(frames), dtype=torch.bool, device=best.device).index_fill(0, best, True)
    label = torch.zeros_like(centre, dtype=torch.long).scatter(0, best, torch.arange(len(best), device=best.device))
    return label[to_centres(distance, centre[None])[0]]


def refine(labels: Sequence[int]) -> list[int]:
    """Make clusters of frames contiguous: each keeps its longest run (several of equal length stay), if that is above 1.

    The gaps in between are filled from left to right, each with the label of the longer of its two neighbouring runs, the left
    one's when they are equally long. Frames that have joined the run on the left count as part of it. If no run stays, all
    frames are label 0.
    """
    spans = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(n for own, n in spans if own == label) for label, _ in spans}
    stays = [label if n == longest[label] > 1 else None for label, n in spans for _ in range(n)]
    spaced = [(label, len(list(run))) for label, run in groupby(stays)]  # None: a gap
    out: list[int] = []
    for (label, n), (right, after) in zip(spaced, [*spaced[1:], (None, 0)], strict=True):
        if label is None:
            left = runs(out)[-1] if out else 0
            label = right if after > left and right is not None else out[-1] if out else 0
        out += [label] * n
    return out


def static_runs(static: Tensor, longest: int = 1024) -> tuple[list[int], int]:
    """Cut a video so that as many tokens as possible repeat those of the frame before (HoliTom, section 3.2).

    static: (T - 1, P) bool, whether a place looks the same in frames t and t + 1. A segment from s to e saves (e - s) tokens for
    each place that is the same in all of it. Returns the segments' lengths and how many tokens are saved. Dynamic programme
    over the ends of segments, the shortest of equally good ones: O(T (P + T)).
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
