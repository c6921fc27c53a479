"""Frames of a video side by side: which token lies where a token lay one frame earlier, and how alike the two are."""

from __future__ import annotations

import torch
from torch import Tensor

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
