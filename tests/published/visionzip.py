"""VisionZip as its authors run it: tokens with [CLS], before the projector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.methods.connector.visionzip import visionzip_plan
from tokprune.ops.numeric import wide
from tokprune.ops.topk import rows_at


def visionzip(
    attention: Tensor, hidden: Tensor, metric: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor]:
    """The published token set before the projector: [CLS], dominant patches in raster order, context tokens.

    attention: (B, H, N) [CLS] rows. hidden: (B, N + 1, C) and metric: (B, N + 1, d) head-mean keys, [CLS] first.
    dominant counts [CLS]. Returns tokens (B, dominant + contextual, C) and the kept indices (B, dominant) with [CLS] =
    0, best first.
    """
    best, targets, into, _ = visionzip_plan(
        wide(attention).sum(1), wide(metric[:, 1:]), dominant - 1, contextual, "published"
    )
    cls = best.new_zeros(best.shape[0], 1)
    lead = torch.cat([cls, best.sort(-1).values + 1], dim=1)  # (B, dominant)
    # Each state is read once: into the sum of its context token, or into one row more that nobody looks at.
    numbers = torch.full((len(cls), into.shape[1] + 1), contextual, device=cls.device)
    numbers.scatter_(1, targets, torch.arange(contextual, device=cls.device).expand_as(targets))
    slot = numbers.gather(1, torch.where(into < 0, into.shape[1], into))  # (B, N)
    slot = slot.scatter(1, targets, contextual)
    slot = F.pad(slot, (1, 0), value=contextual) + (contextual + 1) * torch.arange(len(cls), device=cls.device)[:, None]
    states = wide(hidden).flatten(0, 1)
    sums = states.new_zeros(len(cls) * (contextual + 1), hidden.shape[-1]).index_add_(0, slot.flatten(), states)
    sums = sums.view(len(cls), contextual + 1, -1)[:, :-1]
    count = torch.bincount(slot.flatten(), minlength=len(cls) * (contextual + 1)).view(len(cls), -1)[:, :-1, None]
    chosen = torch.cat([lead, targets + 1], dim=1)
    out = rows_at(hidden, chosen)
    out[:, dominant:] += (sums / count.clamp_min(1)).to(hidden)
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
