"""WFS-SB: scenes where the frames' relevance changes, and diverse relevant frames of each. Host, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tokprune.errors import OptionError
from tokprune.ops.keyframes import check_count, middles

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


def deepest_level(n: int) -> int:
    """How often a signal of `n` values can be halved before the filter is longer than what is left."""
    return max(0, int(math.log2(n / (TAPS - 1)))) if n >= TAPS else 0


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


def peaks(values: Signal, height: float, prominence: float, distance: int) -> list[int]:
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


Array = npt.NDArray[np.float64]
WEIGHTS = (0.4, 0.2, 0.3, 0.1)


def detail_level(frames: int) -> int:
    """Level of the band that shows the scenes of a video: log2 T - 3, as deep as the filter allows, but at least 1."""
    return min(max(int(math.log2(frames)) - 3, 1), max(deepest_level(frames), 1))


def least_distance(frames: int) -> int:
    """How many frames the boundaries between scenes are apart at least: 2 % of the video, but at least 5."""
    return max(5, int(0.02 * frames))


def relevance_boundaries(scores: Array) -> list[int]:
    """First frames of all scenes but the first: peaks of the scores' coarsest detail band (db4). (T,) -> ascending."""
    n = len(scores)
    detail = np.abs(detail_band(scores, detail_level(n)))
    span = detail.max() - detail.min()
    if span <= 1e-9 * np.abs(scores).max():  # nothing but rounding
        return []
    return [p for p in peaks(detail, detail.mean() + 0.5 * detail.std(), 0.05 * span, least_distance(n)) if p > 0]


def scene_importance(scores: Array, bounds: Sequence[int], weights: Sequence[float] = WEIGHTS) -> Array:
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


def largest_remainders(total: int, shares: Array) -> list[int]:
    """Whole numbers in proportion to the shares (which add up to 1), with an exact sum; ties to the later one."""
    wish = shares * total
    out = np.floor(wish).astype(np.int64)
    out[np.argsort(wish - out, kind="stable")[::-1][: total - int(out.sum())]] += 1
    return [int(k) for k in out]


class Diverse:
    """Frames chosen one by one, each for its score and for how little it resembles those chosen before (MMR)."""

    def __init__(self, scores: Array, features: Array | None, balance: float) -> None:
        self.scores, self.balance = scores, balance
        self.rows = None
        if features is not None:
            norm = np.linalg.norm(features, axis=1, keepdims=True)
            self.rows = features / np.where(norm > 0, norm, 1)

    def likeness(self, begin: int, end: int, frame: int) -> Array:
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
    below the mean by `strictness` standard deviations (or below 0.05) get nothing, unless that left none. balance: 0 is relevance alone, 1
    diversity alone. Without scenes: half evenly spaced from the first frame to the last, half the best (the later of
    equals). Constant scores: evenly spaced. O(T M C / S) for M frames in S scenes of equal length.
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
