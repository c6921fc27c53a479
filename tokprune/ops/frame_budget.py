"""Exact budgets of frames, on the host: by weight with a floor, as whole frames, as rectangles to resize to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

from tokprune.budget import share


def weighted_shares(total: int, weights: Sequence[float], capacities: Sequence[int], minimum: int = 0) -> list[int]:
    """Split `total` over frames in proportion to their weights, none above its capacity, with an exact sum.

    Each frame first gets `minimum` tokens (or what it has, if that is less); where the total does not reach, the
    heaviest frames get theirs first, ties to the earlier one. The rest is water-filled: what a full frame cannot take
    flows to the others by weight; largest remainders decide the rounding. Weights that are NaN, infinite or negative
    count as 0; all 0 as equal. O(T log T) for each frame that is filled up, which a few are.
    """
    caps = list(capacities)
    weights = [w if math.isfinite(w) and w > 0 else 0.0 for w in weights]
    if sum(weights) <= 0:
        weights = [1.0] * len(caps)
    base = [min(minimum, cap) for cap in caps]
    if sum(base) > total:
        left, out = total, [0] * len(caps)
        for i in sorted(range(len(caps)), key=lambda i: -weights[i]):
            out[i] = min(base[i], left)
            left -= out[i]
        return out
    more = share(total - sum(base), weights, [cap - b for cap, b in zip(caps, base, strict=True)])
    return [b + m for b, m in zip(base, more, strict=True)]


def whole_frames(total: int, choose: Callable[[int], Sequence[int]], capacities: Sequence[int]) -> list[int]:
    """As few whole frames as hold `total` tokens; the last one is cut so that the sum is exact.

    choose: gives M different frames for every M from 1 to T, those that come first keep all their tokens.
    """
    caps = list(capacities)
    count = max(1, -(-total // max(max(caps), 1)))
    order = choose(count)
    while sum(caps[i] for i in order) < total:  # frames of different sizes: it may take more of them
        count += 1
        order = choose(count)
    out, left = [0] * len(caps), total
    for i in order:
        out[i] = min(caps[i], left)
        left -= out[i]
    return out


@lru_cache(maxsize=256)
def rectangles(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The sizes to which a grid may be resized: at most as high and as wide, and no more than twice as slim or as flat.

    One for each number of tokens, the one whose form is nearest to the grid's (taller where two are). Ascending, as (h,
    w).
    """
    best: dict[int, tuple[float, int, int]] = {}
    for h in range(1, height + 1):
        for w in range(1, width + 1):
            tall, flat = h * width, w * height  # tall / flat = (h / w) / (height / width)
            if max(tall, flat) <= 2 * min(tall, flat):
                # Fractions a/b ≥ 1 compare exactly as floats of a few thousand do; taller (-h) wins among equals.
                key = (max(tall, flat) / min(tall, flat), -h, w)
                best[h * w] = min(best.get(h * w, key), key)
    return tuple((-h, w) for _, (_, h, w) in sorted(best.items()))


def rectangle(grid: tuple[int, int], count: int) -> tuple[int, int] | None:
    """The rectangle of exactly `count` tokens to which a grid may be resized, or None if there is none."""
    return next((s for s in rectangles(*grid) if s[0] * s[1] == count), None)


def rectangular_shares(shares: Sequence[int], grids: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Shares turned into numbers of tokens that form rectangles, and how many tokens are left over.

    Each frame starts with the largest rectangle that its share holds. Then the frame that lacks most gets the next
    larger one, as long as the step fits into what is left (ties: the smaller step, then the earlier frame).
    """
    sizes = [[h * w for h, w in rectangles(*grid)] for grid in grids]
    level = [sum(1 for s in options if s <= share) for options, share in zip(sizes, shares, strict=True)]

    def held(i: int) -> int:
        return sizes[i][level[i] - 1] if level[i] else 0

    area = [held(i) for i in range(len(shares))]
    left = sum(shares) - sum(area)

    def step(i: int) -> int:
        return sizes[i][level[i]] - area[i]

    waiting = [
        (area[i] - share, step(i), i) for i, share in enumerate(shares) if share > 0 and level[i] < len(sizes[i])
    ]
    heapify(waiting)
    while left and waiting:
        _, more, i = heappop(waiting)
        if more > left:  # it never will fit: what is left only shrinks
            continue
        level[i], area[i], left = level[i] + 1, area[i] + more, left - more
        if level[i] < len(sizes[i]):
            heappush(waiting, (area[i] - shares[i], step(i), i))
    return area, left


def fit_rectangles(
    shares: Sequence[int], grids: Sequence[tuple[int, int]], capacities: Sequence[int], minimum: int = 0
) -> list[int]:
    """Shares turned into rectangles where they can be; what is left over goes to the frames that lack most.

    capacities: tokens of each frame. The sum stays. A frame keeps its share as it is if it has holes, if its grid is so
    long that a single token is not of its form, or if the largest rectangle within its share is below `minimum`.
    """

    def can(share: int, grid: tuple[int, int], tokens: int) -> bool:
        if grid[0] * grid[1] != tokens or rectangles(*grid)[0] != (1, 1):
            return False
        return max((h * w for h, w in rectangles(*grid) if h * w <= share), default=0) >= min(minimum, share)

    able = [i for i, facts in enumerate(zip(shares, grids, capacities, strict=True)) if can(*facts)]
    area, left = rectangular_shares([shares[i] for i in able], [grids[i] for i in able])
    out = list(shares)
    lacking = []
    for i, a in zip(able, area, strict=True):
        out[i] = a
        lacking.append((a - shares[i], i))
    heapify(lacking)
    while left:
        short, i = heappop(lacking)
        if out[i] < capacities[i]:
            out[i], left = out[i] + 1, left - 1
            heappush(lacking, (short + 1, i))
    return out
