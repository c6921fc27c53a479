"""VisionZip as its authors run it: tokens with [CLS], before the projector."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.connector.visionzip import visionzip_plan
from tokprune.ops.numeric import wide


def visionzip(
    attention: Tensor, hidden: Tensor, metric: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """The published token set before the projector: [CLS], dominant patches in raster order, context tokens.

    attention: (B, H, N) [CLS] rows. hidden: (B, N + 1, C) and metric: (B, N + 1, d) head-mean keys, [CLS] first.
    dominant counts [CLS]. Returns tokens (B, dominant + contextual, C) and the kept indices (B, dominant) with [CLS] =
    0, best first.
    """
    patches = hidden[:, 1:]
    best, targets, into, weight = visionzip_plan(
        wide(attention).sum(1), wide(metric[:, 1:]), dominant - 1, contextual, "published"
    )
    cls = best.new_zeros(best.shape[0], 1)
    lead = torch.cat([cls, best.sort(-1).values + 1], dim=1)  # (B, dominant)
    rows = torch.where(into[:, None, :] == targets[:, :, None], weight[:, None, :], 0.0)  # (B, contextual, N)
    context = (rows @ patches.to(rows)).to(hidden)
    out = torch.cat([hidden.gather(1, lead[..., None].expand(-1, -1, hidden.shape[-1])), context], dim=1)
    return out, torch.cat([cls, best + 1], dim=1)


def visionzip_canvas(tokens: Tensor, kept: Tensor, tiles: tuple[int, int], side: int = 24) -> Tensor:
    """The published order of a tiled image: patches of all tiles in raster order of the canvas, all [CLS], all context
    tokens.

    tokens: (T, P, D), per tile as `visionzip` returns them. kept: (T, K) with [CLS] = 0. tiles: across, down. side: of
    a tile's grid. Returns (T * P, D).
    """
    across, _ = tiles
    k = kept.shape[1]
    patch = kept.sort(-1).values[:, 1:] - 1  # (T, K - 1)
    tile = torch.arange(kept.shape[0], device=kept.device)[:, None]
    row = tile // across * side + patch // side
    place = row * (across * side) + tile % across * side + patch % side
    patches = tokens[:, 1:k].flatten(0, 1)[place.flatten().argsort()]
    return torch.cat([patches, tokens[:, 0], tokens[:, k:].flatten(0, 1)])
