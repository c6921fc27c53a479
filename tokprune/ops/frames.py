"""Frames of a video side by side: which token lies where a token lay one frame earlier, and how alike the two are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.budget import share
from tokprune.ops.distance import unit
from tokprune.tokens import Layout


def raster(layout: Layout) -> Tensor:
    """Position in the stream of the token at each cell of each frame, -1 where a frame has none.

    Returns (T, P) with P = largest height times largest width, cells row by row.
    """
    height, width = max(h for h, _ in layout.grids), max(w for _, w in layout.grids)
    place = (layout.group * height + layout.row) * width + layout.col
    out = torch.full((layout.num_groups * height * width,), -1, dtype=torch.long, device=place.device)
    out = out.scatter(0, place, torch.arange(place.shape[0], device=place.device))
    return out.unflatten(0, (layout.num_groups, height * width))


def earlier(layout: Layout, step: Tensor | int = 1) -> Tensor:
    """Position of the token at the same cell `step` frames before, -1 where there is none.

    step: one number, or (T,) one per frame; 0 means "none". The groups of a picture or of tiles do not follow one another in
    time: -1 for all of them. Returns (N,).
    """
    if layout.kind != "video":
        return torch.full_like(layout.group, -1)
    width = max(w for _, w in layout.grids)
    back = torch.as_tensor(step, device=layout.group.device).expand(layout.num_groups)[layout.group]
    before = layout.group - back
    found = raster(layout)[before.clamp(min=0), layout.row * width + layout.col]
    return torch.where((before >= 0) & (back > 0), found, -1)


def similarity_to(features: Tensor, other: Tensor, missing: float, block: int = 16384) -> Tensor:
    """Cosine of each token with the token at `other`, in float32 (float64 stays); `missing` where that is -1.

    features: (N, D). other: (N,). Taken `block` tokens at a time, so that no second copy of a long video is made.
    """
    parts = []
    for begin in range(0, features.shape[0], block):
        mate = other[begin : begin + block]
        cosine = (unit(features[begin : begin + block]) * unit(features[mate.clamp(min=0)])).sum(-1)
        parts.append(torch.where(mate >= 0, cosine, missing))
    return torch.cat(parts)


def frame_means(features: Tensor, layout: Layout) -> Tensor:
    """Mean of the tokens of each frame, in float32 (float64 stays). features: (N, D) -> (T, D)."""
    wide = features if features.dtype == torch.float64 else features.float()
    total = wide.new_zeros(layout.num_groups, wide.shape[1]).index_add(0, layout.group, wide)
    return total / torch.tensor(layout.group_sizes, device=wide.device).clamp(min=1)[:, None]


def spread(total: int, capacities: Sequence[int]) -> list[int]:
    """As equal shares of `total` as the capacities allow, the odd units at even distances instead of all in front.

    What `budget.equal` hands out, but five tokens of a hundred frames come from five frames all over the video.
    """
    caps = list(capacities)
    out = share(total, [1.0] * len(caps), caps)
    level = max(out, default=0)
    flexible = [i for i, cap in enumerate(caps) if cap >= level and out[i] >= level - 1]
    ups, m = sum(out[i] == level for i in flexible), len(flexible)
    for place, i in enumerate(flexible):
        up = ((place + 1) * ups + m // 2) // m - (place * ups + m // 2) // m
        out[i] = level - 1 + up
    return out


def in_proportion(total: int | Tensor, sizes: Tensor, group: Tensor | None = None) -> Tensor:
    """Shares of `total` in proportion to the sizes, none above its size, with an exact sum. sizes: (P,) long -> (P,) long.

    The running sum is rounded, so that what rounding leaves over falls at even distances along the members: neighbours in
    time make up for each other. total: at most the sum of the sizes. With group, (P,) ascending from 0, members share within
    their group, and total is (groups,). On the device, without waiting for it.
    """
    group = torch.zeros_like(sizes) if group is None else group
    totals = torch.as_tensor(total, device=sizes.device).reshape(-1)
    whole = torch.zeros_like(totals).index_add(0, group, sizes)
    upto = sizes.cumsum(0) - (whole.cumsum(0) - whole)[group]
    whole = whole[group].clamp(min=1)
    rounded = torch.div(2 * totals[group] * upto + whole, 2 * whole, rounding_mode="floor")
    before = torch.cat([rounded.new_zeros(1), rounded[:-1]])
    return rounded - before.masked_fill(group != torch.cat([group.new_full((1,), -1), group[:-1]]), 0)
