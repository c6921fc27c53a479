"""Which frames, from a score per frame: AKS, and WFS-SB with its wavelets. On the host, float64."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tokprune.errors import OptionError

Signal = npt.NDArray[np.float64]

# Daubechies' filter of eight taps with four vanishing moments, for analysis (low pass, in the order of convolution).
LOW = np.array(
    [
        -0.010597401784997278,
        0.032883011666982945,
        0.030841381835986965,
        -0.18703481171888114,
        -0.02798376941698385,
        0.6308807679295904,
        0.7148465705525415,
        0.23037781330885523,
    ]
)
HIGH = LOW[::-1] * np.array([-1.0, 1.0] * 4)
TAPS = len(LOW)


def analyse(values: Signal) -> tuple[Signal, Signal]:
    """Approximation and detail, each of floor((n + 7) / 2) values; the ends are mirrored (symmetric extension)."""
    n = len(values)
    place = np.arange(-(TAPS - 1), n + TAPS - 1) % (
        2 * n
    )  # a signal shorter than the filter is mirrored again and again
    mirrored = values[np.where(place < n, place, 2 * n - 1 - place)]
    approximation, detail = (np.convolve(mirrored, f, "valid")[1::2] for f in (LOW, HIGH))
    return approximation[: (n + TAPS - 1) // 2], detail[: (n + TAPS - 1) // 2]


def synthesise(coefficients: Signal, band: Signal) -> Signal:
    """The signal of one band. band: LOW or HIGH. k coefficients give 2 k - 6 values."""
    spread = np.zeros(2 * len(coefficients) - 1)
    spread[::2] = coefficients
    return np.convolve(spread, band[::-1])[TAPS - 2 : 2 * len(coefficients)]


def detail_band(values: Signal, level: int) -> Signal:
    """What of a signal varies at the scale of 2^level values: the detail of that level alone. (n,) -> (n,)."""
    lengths, approximation, detail = [], values, np.zeros(0)
    for _ in range(level):
        lengths.append(len(approximation))
        approximation, detail = analyse(approximation)
    out, band = detail, HIGH
    for n in reversed(lengths):
        out = synthesise(out, band)[:n]
        band = LOW
    return out


def prominent_peaks(values: Signal, height: float, prominence: float, distance: int) -> list[int]:
    """Local maxima (the middle of flat ones), ascending.

    height, prominence: at least. Prominence is how far one has to come down from a peak, on the side where it is less,
    before it goes up beyond it. distance: of two peaks nearer than this the lower goes, from the highest on; of equal
    ones the later stays.
    """
    n = len(values)
    edges = np.flatnonzero(np.diff(values) != 0)  # last place of every flat run but the last
    starts, ends = np.r_[0, edges + 1], np.r_[edges, n - 1]
    level = values[starts]
    rises = np.r_[False, level[1:] > level[:-1]]
    falls = np.r_[level[:-1] > level[1:], False]
    top = rises & falls & (level >= height)
    found = (starts[top] + ends[top]) // 2
    keep = np.ones(len(found), dtype=bool)
    for i in np.argsort(values[found], kind="stable")[::-1]:
        if keep[i]:
            near = np.abs(found - found[i]) < distance
            near[i] = False
            keep &= ~near
    return [int(p) for p in found[keep] if _prominence(values, int(p)) >= prominence]


def _prominence(values: Signal, peak: int) -> float:
    sides = []
    for side in (values[peak::-1], values[peak:]):
        higher = np.flatnonzero(side > values[peak])
        sides.append(side[: higher[0] if len(higher) else len(side)].min())
    return float(values[peak] - max(sides))


WEIGHTS = (0.4, 0.2, 0.3, 0.1)


def detail_level(frames: int) -> int:
    """Level of the band that shows the scenes of a video: log2 T - 3, but at least 1."""
    return max(int(math.log2(frames)) - 3, 1)  # beyond 1 within log2(T / 7), as deep as eight taps allow


def least_distance(frames: int) -> int:
    """How many frames the boundaries between scenes are apart at least: 2 % of the video, but at least 5."""
    return max(5, int(0.02 * frames))


def relevance_boundaries(scores: Signal) -> list[int]:
    """First frames of all scenes but the first: peaks of the scores' coarsest detail band (db4). (T,) -> ascending."""
    n = len(scores)
    detail = np.abs(detail_band(scores, detail_level(n)))
    span = detail.max() - detail.min()
    if span <= 1e-9 * np.abs(scores).max():  # nothing but rounding
        return []
    return [
        p for p in prominent_peaks(detail, detail.mean() + 0.5 * detail.std(), 0.05 * span, least_distance(n)) if p > 0
    ]


def scene_importance(scores: Signal, bounds: Sequence[int], weights: Sequence[float] = WEIGHTS) -> Signal:
    """Importance of each scene: its share of the video, its mean and best score, its variance.

    bounds: 0 … T. Returns (S,), the weighted sum; the variance is relative to the whole video's.
    """
    spread = scores.var() + 1e-8
    rows = [
        (
            (end - begin) / len(scores),
            scores[begin:end].mean(),
            scores[begin:end].max(),
            scores[begin:end].var() / spread,
        )
        for begin, end in pairwise(bounds)
    ]
    return np.array(rows) @ np.array(weights, dtype=np.float64)


def largest_remainders(total: int, shares: Signal) -> list[int]:
    """Whole numbers in proportion to the shares (which add up to 1), with an exact sum; ties to the later one."""
    wish = shares * total
    out = np.floor(wish).astype(np.int64)
    out[np.argsort(wish - out, kind="stable")[::-1][: total - int(out.sum())]] += 1
    return [int(k) for k in out]


class Diverse:
    """Frames chosen one by one, each for its score and for how little it resembles those chosen before (MMR)."""

    def __init__(self, scores: Signal, features: Signal | None, balance: float) -> None:
        self.scores, self.balance = scores, balance
        self.rows = None
        if features is not None:
            norm = np.linalg.norm(features, axis=1, keepdims=True)
            self.rows = features / np.where(norm > 0, norm, 1)

    def likeness(self, begin: int, end: int, frame: int) -> Signal:
        """How much the frames from begin to end resemble one frame: cosine, or without features nearness in time."""
        if self.rows is None:
            return np.exp(-np.abs(np.arange(begin, end) - frame) / 10)
        return self.rows[begin:end] @ self.rows[frame]

    def choose(self, begin: int, end: int, count: int, chosen: Sequence[int] = ()) -> list[int]:
        """`count` more frames from begin to end.

        chosen: those that are chosen already; without any, the best one is the first.
        """
        out = list(chosen)
        worth = (1 - self.balance) * (2 * self.scores[begin:end] - 1)
        nearest = np.full(end - begin, -np.inf)
        taken = np.zeros(end - begin, dtype=bool)
        for frame in chosen:
            nearest = np.maximum(nearest, self.likeness(begin, end, frame))
            taken[frame - begin] = True
        while len(out) < len(chosen) + count:
            value = worth - self.balance * nearest if out else self.scores[begin:end]
            frame = begin + int(np.argmax(np.where(taken, -np.inf, value)))
            out.append(frame)
            taken[frame - begin] = True
            nearest = np.maximum(nearest, self.likeness(begin, end, frame))
        return out[len(chosen) :]


def wfs_sb(
    scores: Sequence[float],
    count: int,
    features: npt.ArrayLike | None = None,
    weights: Sequence[float] = WEIGHTS,
    strictness: float = 1.2,
    balance: float = 0.5,
) -> list[int]:
    """Exactly `count` of T frames: scenes, frames per scene by its importance, diverse frames within it. Ascending.

    scores: (T,) in 0 … 1. features: (T, C), what frames are compared by; None compares their time. weights: of a
    scene's duration, mean, best and variance in its importance. With more than three scenes those whose importance is
    below the mean by `strictness` standard deviations (or below 0.05) get nothing, unless that left none. balance: 0 is
    relevance alone, 1 diversity alone. Without scenes: half evenly spaced from the first frame to the last, half the
    best (the later of equals). Constant scores: evenly spaced. O(T M C / S) for M frames in S scenes of equal length.
    """
    values = np.asarray(scores, dtype=np.float64)
    total = len(values)
    check_count(count, total)
    if count == total or values.max() - values.min() <= 1e-6 * np.abs(values).max():
        return middles(total, count)
    rows = None if features is None else np.asarray(features, dtype=np.float64)
    if rows is not None and (rows.ndim != 2 or len(rows) != total):
        raise OptionError(f"features have shape {rows.shape} for {total} frames; write ({total}, C).")
    bounds = [0, *relevance_boundaries(values), total]
    diverse = Diverse(values, rows, balance)
    if len(bounds) == 2:
        even = [int(i) for i in np.linspace(0, total - 1, count // 2, dtype=int)]
        best = [int(i) for i in np.argsort(values, kind="stable")[::-1]]
        rest = [i for i in best if i not in even]
        return sorted([*even, *rest[: count - len(even)]])
    importance = scene_importance(values, bounds, weights)
    kept = np.ones(len(importance), dtype=bool)
    if len(importance) > 3:
        kept = importance >= max(0.05, importance.mean() - strictness * importance.std())
    if not kept.any():
        kept[:] = True
    share = np.where(kept, np.exp(importance - importance.max()), 0.0)
    chosen: list[int] = []
    for (begin, end), k in zip(pairwise(bounds), largest_remainders(count, share / share.sum()), strict=True):
        chosen += diverse.choose(begin, end, min(k, end - begin))
    if len(chosen) < count:  # scenes shorter than their share
        chosen += diverse.choose(0, total, count - len(chosen), chosen)
    return sorted(chosen)


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
