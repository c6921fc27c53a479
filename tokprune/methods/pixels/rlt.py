"""Run-length tokens: what stands still in a clip is encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.methods.options import option
from tokprune.methods.pixels_base import PixelMethod, PixelUnits, Prediction, distance
from tokprune.registry import Checked, register_method


def runs(first: Tensor, last: Tensor, threshold: float, anchored: bool) -> tuple[Tensor, Tensor]:
    """Mean absolute change of each unit since the one before it at its place, and the time of that one.

    first, last: (B, t, n, P) pixels of the first and last frame of each temporal patch. anchored: since the last unit
    that changed by more than `threshold`. Returns (B, t, n) each; the first patch has changed without bound.
    """
    b, t, n, _ = first.shape
    change, since = first.new_full((b, t, n), torch.inf), torch.zeros(b, t, n, dtype=torch.long, device=first.device)
    held, held_at = last[:, 0], since[:, 0]
    for time in range(1, t):
        change[:, time], since[:, time] = distance(first[:, time], held, "mean"), held_at
        new = ~(change[:, time] <= threshold) if anchored else torch.ones_like(held_at, dtype=torch.bool)
        held = torch.where(new[..., None], last[:, time], held)
        held_at = torch.where(new, time, held_at)
    return change, since


@register_method(
    "rlt",
    paper="Don't Look Twice: Faster Video Transformers with Run-Length Tokenization",
    year=2024,
    url="https://arxiv.org/abs/2411.05222",
    complexity="O(NP)",
    memory="O(NP)",
    adaptive=True,
    video=True,
    checked=Checked(
        differs="no length encoding, which is trained; anchored by default, anchored=False is the paper's rule; exact "
        "counts are ours; not run beside its code",
    ),
)
@dataclass(frozen=True)
class RLT(PixelMethod):
    """Run-length tokenization (NeurIPS 2024) without its trained length encoding: the first temporal patch stays whole.

    A unit goes when the first frame of its patch differs from the last frame of the patch before, at its place, by no
    more than `threshold` in mean absolute value (0.1 in the paper). anchored: from the last patch whose unit was kept
    there, or slow fades would be lost (ours); anchored=False is the paper's rule. With `ratio` or `budget` the units of
    the clip are ranked by their change (anchored=False), those of the first patch before all others and among each
    other by the largest change that comes at their place (ours). Pictures stay whole.
    """

    over_time: ClassVar[bool] = True
    threshold: float = option(0.1, low=0, high=1)
    anchored: bool = True

    def predict(self, units: PixelUnits, ranked: bool) -> Prediction:
        t, h, w = units.grid
        x = units.values.flatten(3).unflatten(1, (t, h * w))  # (B, t, n, T, C * P)
        change, since = runs(x[..., 0, :], x[..., -1, :], self.threshold, self.anchored and not ranked)
        if ranked and t > 1:
            change[:, 0] = BEFORE_ALL + change[:, 1:].amax(1)
        source = since * h * w + torch.arange(h * w, device=since.device)
        return Prediction(change.flatten(1), source.flatten(1))


BEFORE_ALL = 16.0
"""Above any change: pixels differ by at most 1."""
