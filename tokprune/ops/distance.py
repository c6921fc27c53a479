"""Normalised features, similarities and distances in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(features: Tensor) -> Tensor:
    """Rows of unit length in float32 (float64 stays). features: (..., N, D). A zero row stays zero instead of NaN."""
    wide = features if features.dtype == torch.float64 else features.float()
    return wide / wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)


def cosine_similarity(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Cosine of every pair. a: (..., N, D), b: (..., M, D) or None for a with itself -> (..., N, M)."""
    rows = unit(a)
    return rows @ (rows if b is None else unit(b)).transpose(-1, -2)


def cosine_distance(features: Tensor) -> Tensor:
    """1 - cosine of every pair. features: (..., N, D) -> (..., N, N)."""
    return 1.0 - cosine_similarity(features)
