"""Normalised features, similarities and distances in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_target(features: Tensor, targets: Tensor) -> Tensor:
    """Which of the targets each token is most similar to (cosine). O(N K D).

    features: (B, N, D). targets: (B, K) indices into N. Returns (B, N), a place in 0 .. K-1; a target belongs to
    itself, also when another one is its duplicate. Ties go to the lower place.
    """
    rows = unit(features)
    chosen = rows.gather(1, targets[..., None].expand(-1, -1, rows.shape[-1]))
    place = (rows @ chosen.transpose(1, 2)).argmax(-1)
    own = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    return place.scatter(1, targets, own)


def unit(features: Tensor) -> Tensor:
    """Rows of unit length in float32 (float64 stays). features: (..., N, D). A zero row stays zero instead of NaN."""
    wide = features if features.dtype == torch.float64 else features.float()
    return wide / wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)


def gram(rows: Tensor) -> Tensor:
    """Inner products of all pairs of rows. rows: (..., N, D) -> (..., N, N).

    On a CPU, where time goes with the number of multiplications, the blocks below the diagonal are mirrored: a third
    less.
    """
    n = rows.shape[-2]
    if rows.device.type != "cpu" or n < 256:
        return rows @ rows.transpose(-1, -2)
    out = rows.new_empty(*rows.shape[:-1], n)
    step = max(128, -(-n // 8))  # smaller blocks multiply less, but each less efficiently
    for start in range(0, n, step):
        stop = min(start + step, n)
        block = rows[..., start:stop, :] @ rows[..., start:, :].transpose(-1, -2)
        out[..., start:stop, start:] = block
        out[..., stop:, start:stop] = block[..., stop - start :].transpose(-1, -2)
    return out


def cosine_similarity(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Cosine of every pair. a: (..., N, D), b: (..., M, D) or None for a with itself -> (..., N, M)."""
    rows = unit(a)
    return gram(rows) if b is None else rows @ unit(b).transpose(-1, -2)


def cosine_distance(features: Tensor) -> Tensor:
    """1 - cosine of every pair. features: (..., N, D) -> (..., N, N)."""
    return 1.0 - cosine_similarity(features)
