"""Bipartite soft matching: which tokens merge into which, and the merging itself (ToMe; ICLR 2023, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.ops.distance import unit


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

    metric: (B, N, d), compared by cosine in float32. r: reduced to `cap(N, prefix)`; 0 or less merges nothing. prefix: the
    first tokens ([CLS], distillation, registers) neither merge nor are merged into. Several tokens may have the same
    partner; equal similarities: lower index first.

    Order of the output rows. ordered: by position, so that they stay in raster order. Otherwise as published: the prefix, the
    even ones that stay, the odd ones; the even ones ascend when there is a prefix, and run from most to least similar when
    there is none. The order decides who is even and odd in the next round.
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
    similarity = rows[:, even] @ rows[:, odd].transpose(-1, -2)  # (B, A, O)
    similarity = similarity.masked_fill((even < prefix)[:, None] | (odd < prefix), -torch.inf)
    partner = similarity.argmax(-1)  # (B, A)
    value = similarity.gather(-1, partner[..., None])[..., 0]
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


def merge(matching: Matching, x: Tensor, mode: Literal["mean", "sum", "amax"] = "mean") -> Tensor:
    """Reduce the inputs of each output row. x: (B, N, C) -> (B, K, C) in x's dtype; differentiable."""
    out = x.new_zeros(x.shape[0], matching.rep.shape[1], x.shape[2])
    index = matching.assign[..., None].expand_as(x)
    return out.scatter_reduce(1, index, x, mode, include_self=False)


def merge_weighted(matching: Matching, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the inputs of each row, weighted by how many original tokens each stands for, and the new sizes.

    x: (B, N, C), size: (B, N, 1) or None for ones -> (B, K, C) in x's dtype and (B, K, 1). Sums and sizes are float32 (float64
    stays): half precision counts exactly only to 256 or 2048.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    size = wide.new_ones(x.shape[0], x.shape[1], 1) if size is None else size.to(wide.dtype)
    total = merge(matching, size, "sum")
    return (merge(matching, wide * size, "sum") / total).to(x.dtype), total
