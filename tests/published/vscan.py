"""VScan as its authors run it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.connector.vscan import vscan_merge, window_of
from tokprune.ops.numeric import wide
from tokprune.ops.topk import rank_in_group, top_by_tier


def vscan_published(
    features: Tensor, shallow: Tensor, deep: Tensor, keep: int, grid: tuple[int, int] = (24, 24), windows: int = 4
) -> tuple[Tensor, Tensor]:
    """What the published code feeds to the LLM; fewer tokens than `keep` where it rounds the windows' shares down.

    features: (B, N, D) projected, N a full grid. shallow, deep: (B, N). Returns kept indices (B, K) and tokens (B, K,
    D).
    """
    cell = torch.arange(grid[0] * grid[1], device=features.device)
    window = window_of(cell // grid[1], cell % grid[1], grid, windows)
    each = keep // 2 // windows**2
    local = rank_in_group(shallow, window) < each
    kept = top_by_tier(local.long(), deep, each * windows**2 + keep - keep // 2)
    place, weight = vscan_merge(features, kept)
    rows = (place[:, None, :] == torch.arange(kept.shape[1], device=place.device)[:, None]) * weight[:, None, :]
    return kept, (rows @ wide(features)).to(features.dtype)
