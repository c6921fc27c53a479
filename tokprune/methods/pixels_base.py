"""The contract of a pixels method: which units of a picture need not be encoded, from their pixel values alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import Method
from tokprune.methods.options import option
from tokprune.ops.topk import ranks

Metric = Literal["max", "mean", "rms"]
"""Largest, mean absolute or root mean square difference of two units' pixel values."""


def distance(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """Distance of pixel vectors. a, b: (..., P) of a shape that fits -> (...)."""
    if metric == "max":
        return (a - b).abs().amax(-1)
    if metric == "mean":
        return (a - b).abs().mean(-1)
    return (a - b).square().mean(-1).sqrt()


@dataclass(frozen=True)
class PixelUnits:
    """The pixels of pictures or clips of one size, cut into units: what becomes one token of the LLM.

    values: (B, N, T, C, P) in float32; a difference of 1 is that of black and white. The N = t * h * w units lie in
    raster order, one temporal patch after the other; T frames make a temporal patch, P pixels of C channels a unit of
    one frame. grid: (t, h, w) in units.
    """

    values: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Prediction:
    """How well each unit is told by another one.

    distance: (B, N) in float32, from the unit to what predicts it; infinite where nothing does. source: (B, N) the unit
    that predicts it, itself where nothing does.
    """

    distance: Tensor
    source: Tensor

    @staticmethod
    def by_frame(distance: Tensor, source: Tensor, frames: int) -> Prediction:
        """Of frames that were looked at one by one. distance, source: (B * frames, units), source within its frame."""
        first = torch.arange(frames, device=source.device)[:, None] * source.shape[1]
        far, found = (x.unflatten(0, (-1, frames)) for x in (distance, source))  # (B, frames, units)
        return Prediction(far.flatten(1), (found + first).flatten(1))


@dataclass(frozen=True)
class Choice:
    """kept: (B, N) bool. source: (B, N) the kept unit that stands for each unit, -1 where none does. worth: (B, N) in
    float32, by which units are ranked, higher = keep.
    """

    kept: Tensor
    source: Tensor
    worth: Tensor


@dataclass(frozen=True)
class PixelMethod(Method):
    """Base of methods that drop units in front of the vision tower. Subclasses implement `predict`.

    Without a ratio or budget a unit is dropped when its distance to its prediction is at most `threshold` (in [0, 1], 1
    is the step from black to white), and the picture's own content decides the count. With one, the units that are
    predicted worst stay, exactly as many as are wanted; equal ones in raster order. std: by what the processor divided
    each channel, where neither the model nor `processor=` says it; threshold 0 does not depend on it.
    """

    stage: ClassVar[str] = "pixels"
    over_time: ClassVar[bool] = False
    """It compares frames of a clip; single pictures stay whole."""

    threshold: float = option(0.0, low=0, high=1)
    std: tuple[float, ...] | None = option(None, above=0, filled=True, example=(0.5, 0.5, 0.5))

    def predict(self, units: PixelUnits, ranked: bool) -> Prediction:
        """What predicts each unit, and how well. ranked: a count is wanted, so the threshold will not decide."""
        raise OptionError(f"{type(self).__name__} does not implement predict(units, ranked).")

    def choose(self, units: PixelUnits, keeps: Sequence[int] | None = None, candidates: Tensor | None = None) -> Choice:
        """Which units stay.

        keeps: how many of each picture, exactly; None: the threshold decides, at least one stays. candidates: (B, N)
        bool, units that the LLM will see at all; the others stay last.
        """
        found = self.predict(units, keeps is not None)
        worth = found.distance if candidates is None else found.distance.masked_fill(~candidates, -1)
        if keeps is None:
            kept = ~(found.distance <= self.threshold)  # NaN stays
        else:
            kept = ranks(worth) < torch.tensor(keeps, device=worth.device)[:, None]
        return Choice(kept, follow(found.source, kept), worth)


def follow(source: Tensor, kept: Tensor) -> Tensor:
    """The kept unit at the end of each unit's chain of predictions, -1 where the chain ends at a dropped one.

    source: (B, N) as of `Prediction`, without circles. kept: (B, N) bool -> (B, N). Chains are halved at each step.
    """
    own = torch.arange(source.shape[1], device=source.device).expand_as(source)
    end = torch.where(kept, own, source)
    for _ in range(max(source.shape[1] - 1, 1).bit_length()):
        end = end.gather(1, end)
    return torch.where(kept.gather(1, end), end, -1)
