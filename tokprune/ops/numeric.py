"""The number format in which choices are made."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """`values` in float32 (float64 stays), cut from the graph: a choice of tokens carries no gradient."""
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()


def finite(scores: Tensor) -> Tensor:
    """Scores in float32 (float64 stays); NaN and infinite ones become the worst there is, at most 0. (T,) -> (T,)."""
    scores = wide(scores)
    known = torch.isfinite(scores)
    worst = torch.where(known, scores, 0.0).amin()
    return torch.where(known, scores, worst)


def stretched(scores: Tensor) -> Tensor:
    """Scores stretched to 0 … 1; all 1 where they differ by no more than rounding does. (T,) -> (T,)."""
    low, high = scores.amin(), scores.amax()
    span = high - low
    flat = span <= 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, 1.0, (scores - low) / torch.where(flat, 1.0, span))


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Without autocast, under which products of float32 tensors are made, and returned, in 16 bits."""
    mixed = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if mixed else contextlib.nullcontext()
