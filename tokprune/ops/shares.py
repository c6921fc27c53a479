"""Sharing a budget out on the device: `tokprune.budget.share` for weights that should not travel to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.budget import share
from tokprune.ops.ranking import ranks


def share_out(total: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """Split `total` into whole numbers proportional to the weights, never above the capacities, with an exact sum.

    weights: (B, P). capacities: (P,) long, sum at least `total`. Returns (B, P) long. The same rule as `budget.share`:
    largest remainders (ties: lower index), what a full member cannot take flows to the others in proportion, and weights
    that are negative, NaN or all zero count as equal. On a CPU it is that function, elsewhere `share_on_device`.
    """
    if weights.device.type == "cpu":
        caps = capacities.tolist()
        return torch.tensor([share(total, row, caps) for row in weights.tolist()], dtype=torch.long)
    return share_on_device(total, weights, capacities)


def share_on_device(total: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """`share_out` by P rounds of element-wise work, without host synchronisation."""
    usable = (torch.isfinite(weights) & (weights >= 0)).all(-1, keepdim=True) & (weights.sum(-1, keepdim=True) > 0)
    weights = torch.where(usable, weights, 1.0)
    out = torch.zeros_like(weights, dtype=torch.long)
    caps = capacities.to(weights.device).expand_as(out)
    for _ in range(weights.shape[-1]):  # each round fills at least one member, or none is full any more
        wish, room = _wishes(total, weights, caps, out)
        out = torch.where((room > 0) & (wish >= room), caps, out)
    wish, room = _wishes(total, weights, caps, out)
    whole = wish.floor().long()
    rest = total - (out + whole).sum(-1, keepdim=True)
    fraction = torch.where(room > 0, wish - whole, -1.0)
    return out + whole + (ranks(fraction) < rest).long()


def _wishes(total: int, weights: Tensor, caps: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """What each member would get of the rest by its weight, and how much room it has."""
    room = caps - out
    left = total - out.sum(-1, keepdim=True)
    active = torch.where(room > 0, weights, 0.0)
    # Only members of weight zero have room: equal shares among them.
    active = torch.where(active.sum(-1, keepdim=True) > 0, active, (room > 0).to(weights.dtype))
    return left * active / active.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny), room
