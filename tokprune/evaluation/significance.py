"""Is a difference between two runs real? Paired statistics over the same questions, in a few lines of numpy.

Two runs are compared question by question: the difficulty of the questions cancels, so that far fewer of them are
needed than for two separate intervals. Intervals come from a paired bootstrap, p values from the exact McNemar test
where every score is 0 or 1 and from a sign-flip permutation test otherwise; Holm's rule corrects for looking at many
cells at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tokprune.errors import OptionError

ROUNDS = 10_000
SEED = 0
EXACT_FLIPS = 14  # up to 2**14 sign patterns are counted out, more are sampled
_CHUNK = 4_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Paired:
    """The outcome of a paired comparison, in the unit of the scores.

    n: questions both runs answered; unpaired: questions only one of them has, left out. base, mean: mean scores over
    the n. low, high: confidence interval of the difference. better, worse: questions with a higher or lower score than
    the base. test: what p comes from, "mcnemar", "permutation" (sampled sign flips) or "sign flips" (all of them).
    """

    n: int
    unpaired: int
    base: float
    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    test: str
    level: float = 0.95

    @property
    def difference(self) -> float:
        """mean - base."""
        return self.mean - self.base


def paired_bootstrap(
    differences: Sequence[float], level: float = 0.95, rounds: int = ROUNDS, seed: int = SEED
) -> tuple[float, float]:
    """Percentile interval of the mean difference over resampled questions (Efron and Tibshirani, 1993, section 13.3).

    Resampling n questions with replacement is a multinomial draw over the distinct differences, which are few for 0/1
    scores.
    """
    values, counts = np.unique(_floats(differences), return_counts=True)
    n = int(counts.sum())
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(values))
    parts = [rng.multinomial(n, counts / n, size=min(step, rounds - at)) @ values / n for at in range(0, rounds, step)]
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact McNemar (sign) test: p of a split at least as uneven, when each changed answer is a fair coin."""
    n, k = better + worse, min(better, worse)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def permutation_test(differences: Sequence[float], rounds: int = ROUNDS, seed: int = SEED) -> tuple[float, bool]:
    """Two-sided p of the mean difference when the sign of each is a fair coin, and whether all sign patterns were
    counted.

    Sampled p values count the observed pattern as one draw (Phipson and Smyth, 2010), so that none is zero.
    """
    d = _floats(differences)
    d = d[d != 0]
    if not len(d):
        return 1.0, True
    # Sums of the same numbers in another order differ by rounding; such patterns are as extreme as the observed one.
    bound = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    if len(d) <= EXACT_FLIPS:
        patterns = np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1
        return float((np.abs((1 - 2 * patterns) @ d) >= bound).mean()), True
    rng = np.random.default_rng(seed)
    hits, step = 0, max(1, _CHUNK // len(d))
    for at in range(0, rounds, step):
        signs = rng.integers(0, 2, size=(min(step, rounds - at), len(d)), dtype=np.int8)
        hits += int((np.abs((1 - 2 * signs) @ d) >= bound).sum())
    return (hits + 1) / (rounds + 1), False


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for being `len(ps)` comparisons (Holm, 1979), in the given order."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    out, last = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        last = max(last, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = last
    return out


def compare(
    base: Mapping[Hashable, float],
    other: Mapping[Hashable, float],
    *,
    level: float = 0.95,
) -> Paired:
    """Compare two runs that map each question to its score; questions of one run alone are counted and left out."""
    both = [q for q in base if q in other]
    if not both:
        raise OptionError(
            f"the two runs share no question: one has {len(base)}, the other {len(other)}, none with the same task "
            f"and doc_id."
        )
    if not 0 < level < 1:
        raise OptionError(f"level={level!r} is not a confidence level; write for example level=0.95.")
    a, b = _floats([base[q] for q in both]), _floats([other[q] for q in both])
    d = b - a
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    low, high = paired_bootstrap(d.tolist(), level)
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        p, test = mcnemar(better, worse), "mcnemar"
    else:
        p, exact = permutation_test(d.tolist())
        test = "sign flips" if exact else "permutation"
    n, unpaired = len(both), len(base) + len(other) - 2 * len(both)
    return Paired(n, unpaired, float(a.mean()), float(b.mean()), low, high, p, better, worse, test, level)


def _floats(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise OptionError("no scores to compare.")
    if not np.isfinite(array).all():
        raise OptionError(
            "a score is not a finite number; scores are compared as they are, so leave such questions out."
        )
    return array


def paired_shares(worse: int, better: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval for the loss (worse - better) / n of `n` questions that are right or wrong twice (Tango,
    Statistics in Medicine 17, 1998, 891-908). It is as wide as few questions make it even where none changed, which a
    bootstrap is not.
    """
    if not 0 <= worse + better <= n or n < 1:
        raise OptionError(f"worse={worse}, better={better} of n={n} questions cannot be.")
    z = NormalDist().inv_cdf((1 + level) / 2)

    def statistic(loss: float) -> float:
        """Distance of the counts from this loss, in standard errors under it."""
        b = -worse - better + (2 * n - worse + better) * loss
        root = max(b * b + 8 * n * better * loss * (1 - loss), 0.0)
        spread = n * ((math.sqrt(root) - b) / (2 * n) + loss * (1 - loss))
        away = worse - better - n * loss
        return away / math.sqrt(spread) if spread > 0 else math.copysign(math.inf, away) if away else 0.0

    def edge(sure: float, out: float, bound: float) -> float:
        for _ in range(60):
            middle = (sure + out) / 2
            inside = abs(statistic(middle)) <= bound
            sure, out = (middle, out) if inside else (sure, middle)
        return sure

    seen = (worse - better) / n
    return edge(seen, -1.0, z), edge(seen, 1.0, z)
