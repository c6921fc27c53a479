"""Inverse and bookkeeping of bipartite matching, as the published code returns them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.ops.merge import Matching, merge


def unmerge(matching: Matching, y: Tensor) -> Tensor:
    """Give each input a copy of the row into which it flowed. y: (B, K, C) -> (B, N, C)."""
    return y.gather(1, matching.assign[..., None].expand(-1, -1, y.shape[2]))


def sources(matching: Matching, source: Tensor | None = None) -> Tensor:
    """Which original tokens each row holds, as 0 and 1. source: (B, N, N0) of earlier rounds or None -> (B, K, N0)."""
    if source is None:
        n = matching.assign.shape[1]
        source = torch.eye(n, device=matching.assign.device).expand(matching.assign.shape[0], n, n)
    return merge(matching, source, "amax")
