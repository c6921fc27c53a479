"""Blank units: of each plain region one unit is encoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.pixels_base import PixelMethod, PixelUnits, Prediction, distance
from tokprune.registry import Checked, register_method


def regions(plain: Tensor, colour: Tensor, threshold: float) -> Tensor:
    """The first unit, in raster order, of each unit's region of plain neighbours of one colour; (M, h * w).

    plain: (M, h, w) bool. colour: (M, h, w, c). Neighbours share an edge and differ by at most `threshold` in each
    channel. Labels spread from neighbour to neighbour, and each step also takes the label of the label.
    """
    m, h, w = plain.shape
    down = plain[:, 1:] & plain[:, :-1] & (distance(colour[:, 1:], colour[:, :-1], "max") <= threshold)
    right = plain[:, :, 1:] & plain[:, :, :-1] & (distance(colour[:, :, 1:], colour[:, :, :-1], "max") <= threshold)
    label = torch.arange(h * w, device=plain.device).view(1, h, w).repeat(m, 1, 1)
    while True:
        new = label.clone()
        lowest = torch.minimum(label[:, 1:], label[:, :-1])
        new[:, 1:] = torch.where(down, torch.minimum(new[:, 1:], lowest), new[:, 1:])
        new[:, :-1] = torch.where(down, torch.minimum(new[:, :-1], lowest), new[:, :-1])
        lowest = torch.minimum(new[:, :, 1:], new[:, :, :-1])
        new[:, :, 1:] = torch.where(right, lowest, new[:, :, 1:])
        new[:, :, :-1] = torch.where(right, torch.minimum(new[:, :, :-1], lowest), new[:, :, :-1])
        flat = new.flatten(1)
        new = flat.gather(1, flat).view_as(label)
        if torch.equal(new, label):
            return label.flatten(1)
        label = new


@register_method(
    "blank",
    paper="after PixelWorld: Towards Perceiving Everything as Pixels",
    year=2025,
    url="https://arxiv.org/abs/2501.19339",
    complexity="O(NP)",
    memory="O(NP)",
    adaptive=True,
    checked=Checked(
        differs="the idea of the paper alone: blank patches carry nothing; regions, colours and exact counts are ours",
    ),
)
@dataclass(frozen=True)
class Blank(PixelMethod):
    """Plain units carry no picture: one stays for each connected region of one colour, so that its colour is told.

    A unit is plain when the standard deviation of each of its channels is at most `threshold`; plain neighbours are one
    region where their mean colours differ by no more. A frame of a clip is a picture of its own. With `ratio` or
    `budget` (ours) regions come first, the largest first, then units by their deviation, and last the repeats.
    """

    def predict(self, units: PixelUnits, ranked: bool) -> Prediction:
        t, h, w = units.grid
        x = units.values.transpose(2, 3).flatten(3).unflatten(1, (t, h, w)).flatten(0, 1)  # (B * t, h, w, C, pixels)
        level = x.amax(-1) == x.amin(-1)  # known exactly, where sums are off by rounding
        deviation = torch.where(level, 0.0, x.std(-1, correction=0)).amax(-1)  # (B * t, h, w)
        label = regions(deviation <= self.threshold, torch.where(level, x[..., 0], x.mean(-1)), self.threshold)
        leads = label == torch.arange(h * w, device=label.device)
        far = torch.zeros_like(deviation).flatten(1).masked_fill(leads, torch.inf)
        if ranked:
            size = torch.zeros_like(label).scatter_add_(1, label, torch.ones_like(label))
            far = torch.where(size > 1, BEFORE_ALL + size.float(), deviation.flatten(1))
            far = torch.where(leads, far, REPEAT)
        return Prediction.by_frame(far, label, t)


BEFORE_ALL = 16.0
"""Above any deviation, which is at most 1."""
REPEAT = -0.5
"""Below all that is no repeat, above what the LLM will not see."""
