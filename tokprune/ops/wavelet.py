"""A band of a signal by the db4 wavelet, and the peaks in it. On the host, float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

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
