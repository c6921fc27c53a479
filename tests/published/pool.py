"""LLaVolta as its authors run it: pooling with a stride."""

from __future__ import annotations

import torch
from torch import Tensor


def average_pool(features: Tensor, stride: int) -> Tensor:
    """Mean of every `stride` tokens in sequence; a tail shorter than that is dropped (section 3.2).

    features: (B, N, D) -> (B, N // stride, D), summed in float32 at least.
    """
    count = features.shape[-2] // stride
    windows = features[..., : count * stride, :].unflatten(-2, (count, stride))
    wide = windows if windows.dtype == torch.float64 else windows.float()
    return wide.mean(-2).to(features.dtype)


def pooled_positions(positions: Tensor, stride: int) -> Tensor:
    """Position of each pooled token: the mean of its tokens' positions, rounded down, in whole numbers.

    positions: (..., N) -> (..., N // stride). The published code takes this mean in float16, which is wrong above 2048.
    """
    count = positions.shape[-1] // stride
    return torch.div(
        positions[..., : count * stride].unflatten(-1, (count, stride)).sum(-1), stride, rounding_mode="floor"
    )


def same_in_half(found: Tensor, published: Tensor) -> bool:
    """Whether positions are the published ones, whose means are taken in float16: exact to 1024, then in steps."""
    step = int(published.max()) * 2.0**-10 if published.numel() else 0
    return bool((found - published).abs().le(0 if step <= 1 else step + 1).all())
