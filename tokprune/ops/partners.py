"""Other ways than bipartite halves to pair tokens: every k-th token, or random ones, as destinations (ToMe, section
4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.bipartite import Matching
from tokprune.ops.distance import unit


def _join(metric: Tensor, source: Tensor, target: Tensor) -> Matching:
    """Each source row flows into its most similar target; targets are the output, in their order.

    metric: (B, N, d). source: (B, S), target: (B, K), together all of 0 .. N-1.
    """
    rows = unit(metric)
    width = rows.shape[-1]
    a = rows.gather(1, source[..., None].expand(-1, -1, width))
    b = rows.gather(1, target[..., None].expand(-1, -1, width))
    partner = (a @ b.transpose(-1, -2)).argmax(-1)  # (B, S)
    place = torch.arange(target.shape[1], device=metric.device).expand_as(target)
    assign = torch.empty(metric.shape[:2], dtype=torch.long, device=metric.device)
    return Matching(target, assign.scatter(1, target, place).scatter(1, source, partner))


@torch.no_grad()
def kth_matching(metric: Tensor, k: int, prefix: int = 0) -> Matching:
    """Every k-th token is a destination, the others flow into the most similar one. metric: (B, N, d) -> K = P + (N -
    P) // k.

    The first `prefix` tokens stay out of it. Tokens behind the last whole group of k are sources like the others (the
    published code drops them: give it only the first (N // k) * k rows). k of 1 or less merges nothing.
    """
    batch, n, _ = metric.shape
    place = torch.arange(n, device=metric.device)
    if k <= 1 or n - prefix < k:
        return Matching(place.expand(batch, n), place.expand(batch, n))
    patch = place[prefix:]
    destination = ((patch - prefix) % k == k - 1)[: (n - prefix) // k * k]
    target = patch[: destination.shape[0]].unflatten(0, (-1, k))[:, -1]
    source = torch.cat(
        [patch[: destination.shape[0]].unflatten(0, (-1, k))[:, :-1].flatten(), patch[destination.shape[0] :]]
    )
    return _with_prefix(metric, source.expand(batch, -1), target.expand(batch, -1), prefix)


@torch.no_grad()
def random_matching(metric: Tensor, r: int, order: Tensor, prefix: int = 0) -> Matching:
    """`r` random tokens flow each into the most similar of the others, which stay in random order.

    metric: (B, N, d). order: (B, N - prefix) a permutation of the tokens behind the prefix, 0-based; its first r are
    the sources. r is reduced so that a destination is left; 0 or less merges nothing.
    """
    batch, n, _ = metric.shape
    r = min(r, n - prefix - 1)
    if r <= 0:
        place = torch.arange(n, device=metric.device).expand(batch, n)
        return Matching(place, place)
    return _with_prefix(metric, order[:, :r] + prefix, order[:, r:] + prefix, prefix)


def _with_prefix(metric: Tensor, source: Tensor, target: Tensor, prefix: int) -> Matching:
    joined = _join(metric[:, prefix:], source - prefix, target - prefix)
    head = torch.arange(prefix, device=metric.device).expand(metric.shape[0], prefix)
    return Matching(torch.cat([head, joined.rep + prefix], 1), torch.cat([head, joined.assign + prefix], 1))
