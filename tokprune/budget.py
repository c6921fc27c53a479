"""Who may keep how many tokens: the one counting rule, and exact ways to share a budget out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from tokprune.errors import BudgetError


def check_ratio(ratio: object) -> float:
    """Return `ratio` as a float, or say why it is not a share of visual tokens to keep (0 < ratio <= 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise BudgetError(
            f"ratio={ratio!r} is a {type(ratio).__name__}; write a number such as ratio=0.1 (10 % of the tokens kept)."
        )
    value = float(ratio)
    if not math.isfinite(value) or not 0.0 < value <= 1.0:
        hint = ""
        if math.isfinite(value) and 1.0 < value <= 100.0:
            hint = f" For {value:g} % write ratio={value / 100:g}; for {value:g} tokens write budget={round(value)}."
        raise BudgetError(f"ratio={ratio!r} is not in (0, 1]. ratio is the share of visual tokens kept.{hint}")
    return value


def check_budget(budget: object) -> int:
    """Return `budget` as an int, or say why it is not a number of tokens to keep (>= 1)."""
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        raise BudgetError(
            f"budget={budget!r} is a {type(budget).__name__}; write a whole number of tokens per image or video, such as budget=64."
        )
    if int(budget) < 1:
        raise BudgetError(f"budget={budget!r} is not a number of tokens to keep; the smallest is 1.")
    return int(budget)


def kept(n: int, ratio: float) -> int:
    """How many of `n` tokens stay at keep ratio `ratio`: max(1, floor(ratio * n + 0.5)), and 0 when there are none.

    Half is rounded up (Python's round() would send 2.5 to 2). The product is taken in float64 and nudged by one part
    in 10^12, so that ratios such as 0.145 of 100 count as the decimal number that was typed.
    """
    if n <= 0:
        return 0
    return min(n, max(1, math.floor(ratio * n * (1 + 1e-12) + 0.5)))


def floor_of(n: int, share: float) -> int:
    """floor(share * n), nudged by one part in 10^12: 0.29 of 100 is 29, where a bare int(0.29 * 100) is 28."""
    return math.floor(share * n * (1 + 1e-12))


def ceil_of(n: int, share: float) -> int:
    """ceil(share * n), nudged by one part in 10^12: 0.55 of 100 is 55, where a bare math.ceil(0.55 * 100) is 56."""
    return math.ceil(share * n * (1 - 1e-12))


def share(total: int, weights: Sequence[float] | Tensor, capacities: Sequence[int], floor: int = 0) -> list[int]:
    """Split `total` into whole numbers proportional to `weights`, never above `capacities`, with an exact sum.

    Largest remainders decide the rounding (ties: lower index first); what a full member cannot take flows to the others
    in proportion to their weights (water-filling). Negative, NaN or all-zero weights count as equal ones.

    total: tokens to hand out; more than sum(capacities) is an error. floor: each member with room gets at least
    min(floor, capacity), as far as `total` reaches (first members first).
    """
    caps = [int(c) for c in capacities]
    if total < 0 or total > sum(caps):
        raise BudgetError(f"cannot share {total} tokens over room for {sum(caps)}.")
    values = weights.detach().double().cpu().tolist() if isinstance(weights, Tensor) else [float(w) for w in weights]
    if len(values) != len(caps):
        raise BudgetError(f"{len(values)} weights for {len(caps)} members.")
    if not all(math.isfinite(v) and v >= 0 for v in values) or sum(values) <= 0:
        values = [1.0] * len(caps)
    peak = max(values, default=1.0)
    values = [v / peak for v in values]  # so that sums and products of huge or tiny weights stay finite
    out = [0] * len(caps)
    for i, cap in enumerate(caps):
        out[i] = min(floor, cap, total - sum(out[:i]))
    while (left := total - sum(out)) > 0:
        room = [i for i, cap in enumerate(caps) if cap > out[i]]
        weight = sum(values[i] for i in room)
        if weight <= 0:  # only members of weight zero have room left: equal shares among them
            for i in room:
                values[i] = 1.0
            weight = float(len(room))
        wish = {i: left * values[i] / weight for i in room}
        full = [i for i in room if wish[i] >= caps[i] - out[i]]
        if full:
            for i in full:
                out[i] = caps[i]
            continue
        whole = {i: math.floor(wish[i]) for i in room}
        rest = left - sum(whole.values())
        for i in sorted(room, key=lambda i: (whole[i] - wish[i], i))[:rest]:
            whole[i] += 1
        for i, extra in whole.items():
            out[i] += extra
    return out


def equal(total: int, capacities: Sequence[int]) -> list[int]:
    """Split `total` as evenly as the capacities allow, with an exact sum."""
    return share(total, [1.0] * len(capacities), capacities)


def counts(labels: Tensor, groups: int) -> list[int]:
    """Number of tokens in each group. labels: (N,) group numbers. One host synchronisation."""
    out: list[int] = torch.bincount(labels, minlength=groups).tolist()
    return out
