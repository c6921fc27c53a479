"""The outlier rule of the box plot."""

from __future__ import annotations

import torch
from torch import Tensor


def upper_outliers(values: Tensor) -> Tensor:
    """Which values lie above Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation. values: (..., N) -> (..., N) bool."""
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device), dim=-1)
    low, high = quartiles[0][..., None], quartiles[1][..., None]
    return values > high + 1.5 * (high - low)
