"""How many visual tokens stay: the one counting rule, and exact ways to share a keep count out over tiles, frames,
images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def check_budget(budget: object, name: str = "budget") -> int:
    """Return `budget` as an int, or say why it is not a number of tokens to keep (>= 1). name: of the argument."""
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        of, example = ("of the whole prompt", 2048) if name == "prompt_budget" else ("per image or video", 64)
        raise BudgetError(
            f"{name}={budget!r} is a {type(budget).__name__}; write a whole number of tokens {of}, such as "
            f"{name}={example}."
        )
    if int(budget) < 1:
        raise BudgetError(f"{name}={budget!r} is not a number of tokens to keep; the smallest is 1.")
    return int(budget)


def kept(n: int, ratio: float) -> int:
    """How many of `n` tokens stay at keep ratio `ratio`: max(1, floor(ratio * n + 0.5)), and 0 when there are none.

    Half is rounded up (Python's round() would send 2.5 to 2). The product is taken in float64 and nudged by one part
    in 10^12, so that ratios such as 0.145 of 100 count as the decimal number that was typed.
    """
    if n <= 0:
        return 0
    return min(n, max(1, round_of(n, ratio)))


def keep_count(n: int, ratio: float | None = None, budget: int | None = None) -> int:
    """How many of `n` tokens a keep ratio or a budget of tokens leaves; all of them where neither is given."""
    if budget is not None:
        return min(n, budget)
    return n if ratio is None else kept(n, ratio)


def floor_of(n: int, share: float) -> int:
    """floor(share * n), nudged by one part in 10^12: 0.29 of 100 is 29, where a bare int(0.29 * 100) is 28."""
    return math.floor(share * n * (1 + 1e-12))


def ceil_of(n: int, share: float) -> int:
    """ceil(share * n), nudged by one part in 10^12: 0.55 of 100 is 55, where a bare math.ceil(0.55 * 100) is 56."""
    return math.ceil(share * n * (1 - 1e-12))


def round_of(n: int, share: float) -> int:
    """floor(share * n + 0.5), the product nudged as in `kept`: a half is rounded up."""
    return math.floor(share * n * (1 + 1e-12) + 0.5)


def share(total: int, weights: Sequence[float] | Tensor, capacities: Sequence[int]) -> list[int]:
    """Split `total` into whole numbers proportional to `weights`, never above `capacities`, with an exact sum.

    Largest remainders decide the rounding (ties: lower index first); what a full member cannot take flows to the others
    in proportion to their weights (water-filling). Negative, NaN or all-zero weights count as equal ones.

    total: tokens to hand out; more than sum(capacities) is an error.
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


def share_between(total: int, weights: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Split `total` as `share` does, but give none less than its `least`: those that would get less take that, and the
    others share the rest.

    total: from sum(least) to sum(most); anything else is an error.
    """
    if total < sum(least):
        raise BudgetError(f"{total} tokens do not reach for the {sum(least)} that cannot be taken away.")
    out, free = list(least), list(range(len(most)))
    while free:
        left = total - sum(least[i] for i in range(len(most)) if i not in free)
        found = share(left, [weights[i] for i in free], [most[i] for i in free])
        short = [i for i, got in zip(free, found, strict=True) if got < least[i]]
        if not short:
            for i, got in zip(free, found, strict=True):
                out[i] = got
            break
        free = [i for i in free if i not in short]
    return out


def equal(total: int, capacities: Sequence[int]) -> list[int]:
    """Split `total` as evenly as the capacities allow, with an exact sum."""
    return share(total, [1.0] * len(capacities), capacities)


def counts(labels: Tensor, groups: int) -> list[int]:
    """Number of tokens in each group. labels: (N,) group numbers. One host synchronisation."""
    out: list[int] = torch.bincount(labels, minlength=groups).tolist()
    return out


def equal_spaced(total: int, capacities: Sequence[int]) -> list[int]:
    """As equal shares of `total` as the capacities allow, the odd units at even distances instead of all in front.

    What `equal` hands out, but five tokens of a hundred frames come from five frames all over the video.
    """
    caps = list(capacities)
    out = equal(total, caps)
    level = max(out, default=0)
    flexible = [i for i, cap in enumerate(caps) if cap >= level and out[i] >= level - 1]
    ups, m = sum(out[i] == level for i in flexible), len(flexible)
    for place, i in enumerate(flexible):
        up = ((place + 1) * ups + m // 2) // m - (place * ups + m // 2) // m
        out[i] = level - 1 + up
    return out


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


def pooled_budgets(gains: Sequence[Tensor], total: int) -> list[int]:
    """How many of the `total` largest gains belong to each image; the first one of each image always counts.

    gains: one falling sequence per image, together at least `total` long, `total` at least the number of images. Ties
    go to the earlier image. One host synchronisation.
    """
    first = [torch.cat([g.new_full((1,), torch.inf), g[1:]]) for g in gains]
    owner = torch.cat([torch.full_like(g, i, dtype=torch.long) for i, g in enumerate(first)])
    best = torch.sort(torch.cat(first), descending=True, stable=True).indices[:total]
    counts: list[int] = torch.bincount(owner[best], minlength=len(gains)).tolist()
    return counts


def in_proportion(total: int | Tensor, sizes: Tensor, group: Tensor | None = None) -> Tensor:
    """Shares of `total` in proportion to the sizes, none above its size, with an exact sum. sizes: (P,) long -> (P,)
    long.

    The running sum is rounded, so that what rounding leaves over falls at even distances along the members: neighbours
    in time make up for each other. total: at most the sum of the sizes. With group, (P,) ascending from 0, members
    share within their group, and total is (groups,). On the device, without waiting for it.
    """
    group = torch.zeros_like(sizes) if group is None else group
    totals = torch.as_tensor(total, device=sizes.device).reshape(-1)
    whole = torch.zeros_like(totals).index_add(0, group, sizes)
    upto = sizes.cumsum(0) - (whole.cumsum(0) - whole)[group]
    whole = whole[group].clamp(min=1)
    rounded = torch.div(2 * totals[group] * upto + whole, 2 * whole, rounding_mode="floor")
    before = torch.cat([rounded.new_zeros(1), rounded[:-1]])
    return rounded - before.masked_fill(group != torch.cat([group.new_full((1,), -1), group[:-1]]), 0)


def share_out(total: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """Split `total` into whole numbers proportional to the weights, never above the capacities, with an exact sum.

    weights: (B, P). capacities: (P,) long, sum at least `total`. Returns (B, P) long. The same rule as `share`: largest
    remainders (ties: lower index), what a full member cannot take flows to the others in proportion, and weights that
    are negative, NaN or all zero count as equal. On a CPU it is that function, elsewhere `share_on_device`.
    """
    if weights.device.type == "cpu":
        caps = capacities.tolist()
        return torch.tensor([share(total, row, caps) for row in weights.tolist()], dtype=torch.long)
    return share_on_device(total, weights, capacities)


def share_on_device(total: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """`share_out` without host synchronisation and without rounds; in float64, as on the host, but on MPS.

    All fill up at the same pace by weight, those of weight zero behind the others. So a member gets full when the total
    covers what is full before it, and everybody else of its kind at the level at which it is full: one comparison of
    all pairs.
    """
    weights = weights.float() if weights.device.type == "mps" else weights.double()
    low, high = weights.aminmax(dim=-1, keepdim=True)  # NaN, where there is any
    usable = (low >= 0) & (high > 0) & (high < torch.inf)
    # At most 1, so that sums and products of huge or tiny weights stay finite.
    weights = torch.where(usable, weights / high, 1.0)
    caps = capacities.to(weights.device).expand(weights.shape)
    lone = weights == 0
    pace = weights + lone
    level = caps / pace
    peers = lone[..., :, None] == lone[..., None, :]  # (B, P, P)
    before = torch.where(peers, level[..., None, :] < level[..., :, None], lone[..., :, None])
    spent = (before * caps[..., None, :]).sum(-1)
    beside = ((peers & ~before) * pace[..., None, :]).sum(-1)
    slack = 1 - 16 * torch.finfo(pace.dtype).eps  # whoever would get all but a rounding error is full
    full = (total - spent) * pace >= caps * beside * slack
    out = caps * full
    active = weights * ~full
    # Only members of weight zero have room: equal shares among them.
    active = torch.where(active.sum(-1, keepdim=True) > 0, active, (~full).to(weights.dtype))
    left = total - out.sum(-1, keepdim=True)
    wish = left * active / active.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    whole = wish.floor().long()
    rest = left - whole.sum(-1, keepdim=True)
    return out + whole + (_ranks((wish - whole).masked_fill(full, -1.0)) < rest)


def _ranks(values: Tensor) -> Tensor:
    """0 for the largest of each row, equal values by index. (..., P) -> (..., P) long."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter(
        -1, order, torch.arange(values.shape[-1], device=values.device).expand_as(order)
    )


def even_steps(total: int, steps: int) -> list[int]:
    """`total` in `steps` whole numbers as equal as can be, the larger ones first."""
    if steps < 1:
        return []
    quotient, rest = divmod(max(total, 0), steps)
    return [quotient + (i < rest) for i in range(steps)]


def geometric_counts(start: int, target: int, steps: int) -> list[int]:
    """Rows left after each of `steps` reductions by the same share, from `start` to exactly `target`."""
    target = min(target, start)
    return [round(start * (target / start) ** ((i + 1) / steps)) if i + 1 < steps else target for i in range(steps)]
