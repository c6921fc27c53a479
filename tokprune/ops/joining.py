"""Selections put together: of parts of a stream, and of tokens merged on top of a merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.ops.distance import cosine_similarity
from tokprune.tokens import Merge, Selection


def join(parts: Sequence[tuple[Tensor, Selection]], features: Tensor) -> Selection:
    """One selection of a stream from selections of disjoint parts of it.

    parts: for each, where its tokens lie in the stream, (n_i,) ascending indices, and what was selected in it. features:
    (N, D) of the stream. Merges are carried over, also when only some parts merge: as target and scale where all parts
    allow it, else as sparse rows. Tensors of `info` that have one entry per token are carried over if the parts cover
    the stream and all of them have it.
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


def merge_dropped(chosen: Selection, features: Tensor) -> Selection:
    """Average each token that flows nowhere into the output most similar to it (cosine, ties to the lower row).

    chosen: a selection of the stream, merging or not. features: (N, D). An output y that takes up tokens x_1 … x_m becomes
    (y + x_1 + … + x_m) / (1 + m), composed with the merge that made y.
    """
    if chosen.features is not None:
        raise OptionError(
            "this method hands out explicit features instead of merge weights, so what it dropped cannot be merged into them; "
            "use it without the wrapper."
        )
    features = features.detach()
    n, k, device = features.shape[0], len(chosen), features.device
    if k == n:
        return chosen
    nearest = cosine_similarity(features, chosen.apply(features)).argmax(-1)  # (N,)
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
