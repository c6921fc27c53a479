"""Which frames, from their scores alone: relevant ones that still cover the video (AKS). On the host, float64."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from tokprune.errors import OptionError


def aks(scores: Sequence[float], count: int, threshold: float = 0.8, depth: int = 5) -> list[int]:
    """Exactly `count` of T frames by judging and splitting (section 3.3), ascending.

    scores: (T,), higher = relevant; stretched to 0 … 1. A part of the video whose best frames (as many as it may
    choose) are more than `threshold` better than its mean chooses them; any other is cut in the middle, and the halves
    choose half as many each, the one with the higher mean the odd one. No part is cut so small that it had nothing to
    choose; at most `depth` times. Parts that are shorter than their number are made up for by the best frames
    elsewhere. Constant scores: evenly spaced frames. O(T log T).
    """
    values = np.asarray(scores, dtype=np.float64)
    total = len(values)
    check_count(count, total)
    span = values.max() - values.min()
    if count == total or span <= 1e-6 * np.abs(values).max():
        return middles(total, count)
    values = (values - values.min()) / span
    chosen = np.zeros(total, dtype=bool)
    parts = deque([(0, total, count, 0)])
    while parts:
        begin, end, share, level = parts.popleft()
        part = values[begin:end]
        top = np.argsort(-part, kind="stable")[:share]
        if level >= depth or share < 2 or end - begin < 2 or part[top].mean() - part.mean() > threshold:
            chosen[begin + top] = True
            continue
        middle = (begin + end) // 2
        more = values[middle:end].mean() > values[begin:middle].mean()  # the right half gets the odd one
        right = share // 2 + (share % 2 if more else 0)
        parts += [(begin, middle, share - right, level + 1), (middle, end, right, level + 1)]
    missing = count - int(chosen.sum())
    rest = np.argsort(-np.where(chosen, -np.inf, values), kind="stable")[:missing]
    chosen[rest] = True
    return [int(i) for i in np.flatnonzero(chosen)]


def aks_published(scores: Sequence[float], count: int, threshold: float = 0.8, depth: int = 5) -> list[int]:
    """The published code: may choose fewer than `count`, and none at all where count < 2^depth."""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < count:
        return list(range(len(values)))
    span = values.max() - values.min()
    # Its 0/0 for constant scores makes all comparisons false, as scores of 0 do.
    values = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    found: list[int] = []
    parts = deque([(0, len(values), 0)])
    while parts:
        begin, end, level = parts.popleft()
        part = values[begin:end]
        order = np.argsort(-part, kind="stable")
        if level < depth and not (len(part) and part[order[:count]].mean() - part.mean() > threshold):
            middle = begin + (end - begin) // 2
            parts += [(begin, middle, level + 1), (middle, end, level + 1)]
        else:
            found += (begin + order[: count // 2**level]).tolist()
    return sorted(found)


def check_count(count: int, total: int) -> None:
    """Refuse a number of frames that a video does not have."""
    if not 1 <= count <= total:
        raise OptionError(f"cannot choose {count} of {total} frames; ask for 1 to {total}.")


def middles(total: int, count: int) -> list[int]:
    """The middles of `count` equal parts of `total` frames, floor((i + 0.5) total / count): all different."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def best_first(frames: Sequence[int], scores: Sequence[float]) -> list[int]:
    """Frames from the best score to the worst, ties to the earlier one."""
    return sorted(frames, key=lambda i: (-scores[i], i))


def cut(order: Sequence[int], sizes: Sequence[int], keep: int) -> list[int]:
    """All tokens of these frames, in this order, up to `keep`."""
    out, left = [0] * len(sizes), keep
    for i in order:
        out[i] = min(sizes[i], left)
        left -= out[i]
    return out
