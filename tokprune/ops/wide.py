"""The number format in which choices are made."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """`values` in float32 (float64 stays), cut from the graph: a choice of tokens carries no gradient."""
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()
