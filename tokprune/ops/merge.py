"""Tokens merged into others: bipartite soft matching, and selections put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import most_similar, unit
from tokprune.ops.topk import rows_at, true_indices
from tokprune.tokens import Merge, Selection, weighted_sums


def join(parts: Sequence[tuple[Tensor, Selection]], features: Tensor) -> Selection:
    """One selection of a stream from selections of disjoint parts of it.

    parts: for each, where its tokens lie in the stream, (n_i,) ascending indices, and what was selected in it.
    features: (N, D) of the stream. Merges are carried over, also when only some parts merge: as target and scale where
    all parts allow it, else as sparse rows. Tensors of `info` that have one entry per token are carried over if the
    parts cover the stream and all of them have it.
    """
    n, device = features.shape[0], features.device
    parts = [(where.to(device), chosen) for where, chosen in parts]
    indices = torch.cat([where[chosen.indices.to(device)] for where, chosen in parts])
    indices, order = indices.sort()
    slots = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    slot = list(slots.split([len(chosen) for _, chosen in parts]))  # output row of each part's picks
    info = _join_info(parts, n)
    if any(chosen.features is not None for _, chosen in parts):
        made = torch.cat([chosen.apply(features[where]) for where, chosen in parts])
        return Selection(indices, features=made[order], info=info)
    if all(chosen.weights is None for _, chosen in parts):
        return Selection(indices, info=info)
    if all(chosen.weights is None or chosen.weights.rows is None for _, chosen in parts):
        target = torch.full((n,), -1, device=device)
        scale = torch.zeros(n, dtype=torch.float32, device=device)
        for (where, chosen), own in zip(parts, slot, strict=True):
            to, much = _target(chosen, len(where), device)
            target[where] = torch.where(to >= 0, own[to.clamp(min=0)], -1)
            scale[where] = much
        return Selection(indices, Merge(target=target, scale=scale), info=info)
    places, values = [], []
    for (where, chosen), own in zip(parts, slot, strict=True):
        row, col, value = _entries(chosen, len(where), device)
        places.append(torch.stack([own[row], where[col]]))
        values.append(value)
    rows = torch.sparse_coo_tensor(torch.cat(places, 1), torch.cat(values), (len(indices), n), check_invariants=False)
    return Selection(indices, Merge(rows=rows.coalesce()), info=info)


def join_nearest(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the targets each token joins, the one that it is most similar to (cosine), and how many each has.

    features: (B, N, D). targets: (B, K) indices into N. Returns a place in 0 .. K-1 for each token, (B, N), and tokens
    at each place, (B, K) in float32 (float64 stays). A target belongs to itself, also when another one is its
    duplicate. Ties go to the lower place. O(N K D).
    """
    rows = unit(features)
    chosen = rows_at(rows, targets)
    own = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    place = most_similar(rows, chosen)[1].scatter(1, targets, own)
    return place, rows.new_zeros(targets.shape).scatter_add_(1, place, rows.new_ones(place.shape))


def merge_dropped(chosen: Selection, features: Tensor) -> Selection:
    """Average each token that flows nowhere into the output most similar to it (cosine, ties to the lower row).

    chosen: a selection of the stream, merging or not. features: (N, D). An output y that takes up tokens x_1 … x_m
    becomes (y + x_1 + … + x_m) / (1 + m), composed with the merge that made y.
    """
    if chosen.features is not None:
        raise OptionError(
            "this method hands out explicit features instead of merge weights, so what it dropped cannot be merged "
            "into them; use it without the wrapper."
        )
    features = features.detach()
    n, k, device = features.shape[0], len(chosen), features.device
    if k == n:
        return chosen
    nearest = most_similar(unit(features), unit(chosen.apply(features)))[1]  # (N,)
    if chosen.weights is None or chosen.weights.rows is None:
        target, scale = _target(chosen, n, device)
        dropped = target < 0
        target = torch.where(dropped, nearest, target)
        share = 1 / (1 + torch.zeros(k, dtype=torch.float32, device=device).index_add(0, nearest, dropped.float()))
        return Selection(
            chosen.indices,
            Merge(target=target, scale=torch.where(dropped, 1.0, scale) * share[target]),
            info=chosen.info,
        )
    rows = chosen.weights.dense(k, n).to(device)
    dropped = ~(rows != 0).any(0)
    rows = rows + torch.zeros_like(rows).index_put((nearest, torch.arange(n, device=device)), dropped.float())
    taken = torch.zeros(k, dtype=torch.float32, device=device).index_add(0, nearest, dropped.float())
    return Selection(chosen.indices, Merge(rows=rows / (1 + taken)[:, None]), info=chosen.info)


def _target(chosen: Selection, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A selection without rows as target and scale, both (n,)."""
    weights = chosen.weights
    if weights is not None and weights.target is not None and weights.scale is not None:
        return weights.target.to(device), weights.scale.to(device).float()
    picks = chosen.indices.to(device)
    target = torch.full((n,), -1, device=device).scatter(0, picks, torch.arange(len(picks), device=device))
    return target, (target >= 0).float()


def _entries(chosen: Selection, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of the non-zero merge weights."""
    if chosen.weights is not None and chosen.weights.rows is not None:
        rows = chosen.weights.rows.to(device)
        sparse = (rows if rows.is_sparse else rows.to_sparse()).coalesce()
        row, col = sparse.indices()
        return row, col, sparse.values().float()
    target, scale = _target(chosen, n, device)
    (col,) = torch.nonzero(target >= 0, as_tuple=True)
    return target[col], col, scale[col]


def _join_info(parts: Sequence[tuple[Tensor, Selection]], n: int) -> dict[str, Tensor]:
    """Per-token tensors of the parts, put together."""
    if sum(len(where) for where, _ in parts) != n:
        return {}
    out: dict[str, Tensor] = {}
    for name, first in parts[0][1].info.items():
        found = [chosen.info.get(name) for _, chosen in parts]
        if all(v is not None and v.shape[:1] == where.shape for v, (where, _) in zip(found, parts, strict=True)):
            whole = first.new_empty(n, *first.shape[1:])
            for value, (where, _) in zip(found, parts, strict=True):
                if value is not None and value.shape[1:] == first.shape[1:]:
                    whole[where.to(whole.device)] = value.to(whole)
            out[name] = whole
    return out


def merged_selection(target: Tensor, weight: Tensor, keep: int, **info: Tensor) -> Selection:
    """The selection in which each token flows to the position `target` (N,), -1 for nowhere; `keep` positions flow to
    themselves.
    """
    indices = true_indices(target == torch.arange(len(target), device=target.device), keep)
    row = torch.where(target >= 0, torch.searchsorted(indices, target.clamp(min=0)), -1)
    return Selection(indices, Merge(target=row, scale=weight), info=info)


def means(seats: Tensor, cell: Tensor, **info: Tensor) -> Selection:
    """The selection whose outputs are plain means. seats: (K,) position at which each output sits, in any order. cell:
    (N,) output into which each token flows, -1 for none.
    """
    indices, order = seats.sort()
    slot = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    inside, cell = cell >= 0, cell.clamp(min=0)
    size = torch.zeros(len(seats), dtype=torch.float32, device=cell.device).index_add(0, cell, inside.float())
    return Selection(indices, Merge(target=torch.where(inside, slot[cell], -1), scale=inside / size[cell]), info=info)


@dataclass(frozen=True)
class Matching:
    """A plan that turns N tokens into K.

    rep: (B, K) input position at which each output row sits (the destination, or a token that was left alone).
    assign: (B, N) output row into which each input flows.
    """

    rep: Tensor
    assign: Tensor


def cap(n: int, prefix: int = 0) -> int:
    """How many of `n` tokens one matching can merge away when the first `prefix` are protected."""
    return max(0, (n - prefix) // 2)


@torch.no_grad()
def bipartite_matching(metric: Tensor, r: int, prefix: int = 0, ordered: bool = False) -> Matching:
    """Send the `r` tokens at even positions that have the most similar partner at an odd position to that partner.

    metric: (B, N, d), compared by cosine in float32. r: reduced to `cap(N, prefix)`; 0 or less merges nothing. prefix:
    the first tokens ([CLS], distillation, registers) neither merge nor are merged into. Several tokens may have the
    same partner; equal similarities: lower index first.

    Order of the output rows. ordered: by position, so that they stay in raster order. Otherwise as published: the
    prefix, the even ones that stay, the odd ones; the even ones ascend when there is a prefix, and run from most to
    least similar when there is none. The order decides who is even and odd in the next round.
    """
    batch, n, _ = metric.shape
    device = metric.device
    r = min(r, cap(n, prefix))
    if r <= 0:
        same = torch.arange(n, device=device).expand(batch, n)
        return Matching(same, same)
    place = torch.arange(n, device=device)
    even, odd = place[0::2], place[1::2]
    rows = unit(metric)
    value, partner = most_similar(rows[:, even], rows[:, odd], odd < prefix)  # (B, A)
    value = value.masked_fill(even < prefix, -torch.inf)
    best_first = torch.sort(value, dim=-1, descending=True, stable=True).indices
    source, stay = even[best_first[:, :r]], even[best_first[:, r:]]  # (B, r), (B, A - r)
    target = odd[partner.gather(-1, best_first[:, :r])]  # (B, r)

    rep = torch.cat([stay, odd.expand(batch, -1)], dim=-1)  # (B, K)
    if ordered:
        rep = rep.sort(-1).values
    elif prefix > 0:  # prefix first, then even, then odd, each ascending: one sort on a number that says so
        rank = torch.where(rep < prefix, rep, rep + n * (1 + rep % 2))
        rep = rep.gather(-1, rank.argsort(-1))
    row = torch.arange(rep.shape[-1], device=device).expand_as(rep)
    assign = torch.empty(batch, n, dtype=torch.long, device=device).scatter(-1, rep, row)
    assign = assign.scatter(-1, source, assign.gather(-1, target))
    return Matching(rep, assign)


@torch.no_grad()
def merged_to(
    features: Tensor, keep: int, step: Callable[[int], int] | None = None, size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Repeat bipartite soft matching until `keep` tokens are left, which stay in raster order.

    features: (B, N, C). step: of n tokens that are left, how many the next round merges; at most half of them can, and
    None merges as many as that. size: (B, N, 1) originals in each, None for ones. Returns the means that are left and
    their sizes, (B, keep, C) and (B, keep, 1) in float32 at least, the positions at which they sit, (B, keep)
    ascending, and (B, N) which of them each input has gone to.
    """
    x = wide(features)
    size = x.new_ones(*x.shape[:2], 1) if size is None else size
    rep = assign = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    while (n := x.shape[1]) > keep:
        matching = bipartite_matching(x, n - keep if step is None else step(n), ordered=True)
        x, size = merge_weighted(matching, x, size)
        rep, assign = rep.gather(-1, matching.rep), matching.assign.gather(-1, assign)
    return x, size, rep, assign


def merge(matching: Matching, x: Tensor, mode: Literal["mean", "sum", "amax"] = "mean") -> Tensor:
    """Reduce the inputs of each output row. x: (B, N, C) -> (B, K, C) in x's dtype; differentiable."""
    out = x.new_zeros(x.shape[0], matching.rep.shape[1], x.shape[2])
    index = matching.assign[..., None].expand_as(x)
    return out.scatter_reduce(1, index, x, mode, include_self=False)


def merge_weighted(matching: Matching, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the inputs of each row, weighted by how many original tokens each stands for, and the new sizes.

    x: (B, N, C), size: (B, N, 1) or None for ones -> (B, K, C) in x's dtype and (B, K, 1). Sums and sizes are float32
    (float64 stays): half precision counts exactly only to 256 or 2048.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = x.new_ones(x.shape[0], x.shape[1], 1, dtype=kind) if size is None else size.to(kind)
    total = merge(matching, size, "sum")
    sums = weighted_sums(x, matching.assign, size[..., 0], matching.rep.shape[1])
    return (sums / total).to(x.dtype), total
