"""The best under conditions: in all, within groups, by tiers first. Stable sorts, so ties go to the lower index; no
host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Some rows of each item of a batch, in the order asked for; differentiable. x: (B, N, D), index: (B, K) -> (B, K,
    D).
    """
    batch, n, width = x.shape
    if x.device.type != "cpu":
        return x.gather(1, index[..., None].expand(-1, -1, width))
    if batch > 1:
        index = index + n * torch.arange(batch, device=x.device)[:, None]
    # Copies whole rows; gather looks every number up, which takes ten times as long here.
    return x.flatten(0, 1).index_select(0, index.flatten()).view(batch, index.shape[1], width)


def true_indices(mask: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` True entries of each row. mask: (..., N) -> (..., count).

    For a known count: unlike nonzero() it needs no host synchronisation. A row with fewer True entries is filled up
    with its lowest False ones.
    """
    if mask.device.type == "cpu" and bool((mask.sum(-1) == count).all()):  # nothing to wait for: no sort either
        return mask.nonzero()[:, -1].view(*mask.shape[:-1], count)
    found = torch.sort(mask.to(torch.int8), dim=-1, descending=True, stable=True).indices[..., :count]
    return found.sort(-1).values


def top(scores: Tensor, keep: int) -> Tensor:
    """The `keep` best of (..., N) scores as ascending indices, (..., keep); equal scores: lower index first."""
    if scores.device.type == "cpu" and keep > 0:  # a partial sort decides unless equal scores straddle the border
        found = (scores >= scores.topk(keep, dim=-1).values[..., -1:]).nonzero()  # `keep` per row, more with ties
        if found.shape[0] * scores.shape[-1] == scores.numel() * keep:
            return found[:, -1].view(*scores.shape[:-1], keep)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(-1).values


def ranks(scores: Tensor) -> Tensor:
    """Place of each entry when sorted best first, 0 for the best. (..., N) -> (..., N)."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def top_by_tier(tier: Tensor, scores: Tensor, keep: int) -> Tensor:
    """The `keep` best by tier, then by score, as ascending indices. tier, scores: (..., N), higher is better -> (...,
    keep).
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    by_tier = torch.sort(tier.gather(-1, order), dim=-1, descending=True, stable=True).indices
    return order.gather(-1, by_tier)[..., :keep].sort(-1).values


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """Place of each token among those of its group, 0 for the best. scores: (..., N), group: (N,) or (..., N) -> (...,
    N).
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    groups, by_group = torch.sort(group.expand(scores.shape).gather(-1, order), dim=-1, stable=True)
    order = order.gather(-1, by_group)  # group after group, best first
    place = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    start = torch.searchsorted(groups, groups)
    return torch.empty_like(order).scatter_(-1, order, place - start)


def top_in_groups(scores: Tensor, group: Tensor, quota: Tensor, keep: int) -> Tensor:
    """The best tokens of each group, as many as its quota says, as ascending indices.

    scores: (..., N). group: (N,), 0-based. quota: (..., G) whole numbers that add up to `keep`, none above its group's
    size.
    """
    if scores.device.type == "cpu" and scores.dim() == 1 and bool((group[1:] >= group[:-1]).all()):
        # Nothing to wait for: a partial sort per group decides unless equal scores straddle a border.
        parts = scores.split(torch.bincount(group, minlength=quota.shape[-1]).tolist())
        counts = zip(parts, quota.tolist(), strict=True)
        reach = [x >= x.topk(k).values[-1] if k > 0 else torch.zeros_like(x, dtype=torch.bool) for x, k in counts]
        found = torch.cat(reach).nonzero()[:, 0]
        if found.shape[0] == keep:
            return found
    ranks = rank_in_group(scores, group)
    return true_indices(ranks < quota.gather(-1, group.expand(scores.shape)), keep)


def group_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum over each token's group, at every token. values: (..., N), group: (N,) in 0 .. groups-1 -> (..., N)."""
    sums = values.new_zeros(*values.shape[:-1], groups).index_add(-1, group, values)
    return sums[..., group]


def grouped_top(scores: Tensor, group: Tensor, budgets: Sequence[int]) -> Tensor:
    """The `budgets[g]` best tokens of every group g, as ascending indices; equal scores: lower index first.

    scores: (N,). group: (N,) group number of each token. budgets: one per group, at most the group's size. Returns
    (sum of budgets,).
    """
    quota = torch.tensor(list(budgets), dtype=torch.long, device=scores.device)
    return top_in_groups(scores, group.to(scores.device), quota, sum(budgets))
