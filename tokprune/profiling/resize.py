"""The honest rival of pruning: the same prompt with a smaller picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from tokprune.errors import OptionError

Prepare = Callable[[Image.Image], Mapping[str, Any]]


def smaller(
    prepare: Prepare, image: Image.Image, count: Callable[[Mapping[str, Any]], int], steps: int = 10
) -> Callable[[float], Mapping[str, Any]]:
    """A function from a share of tokens to inputs made of the picture scaled down until it gives about so many.

    prepare: picture -> inputs, through the processor. count: inputs -> visual tokens. Processors that make a fixed number
    of tokens give the same count at any size; the inputs of the smallest picture tried come back then.
    """
    if min(image.size) < 1:
        raise OptionError(f"the picture is {image.width} x {image.height} pixels; it needs at least one.")
    full = count(prepare(image))

    def scaled(factor: float) -> Mapping[str, Any]:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        return prepare(image.resize(size, Image.Resampling.LANCZOS))

    def inputs_for(share: float) -> Mapping[str, Any]:
        wanted = share * full
        factor = share**0.5  # tokens grow with the area
        best = scaled(factor)
        low, high = 0.0, 1.0
        for _ in range(steps):
            found = count(best)
            if abs(found - wanted) <= max(1.0, 0.02 * wanted):
                break
            if found > wanted:
                high = factor
            else:
                low = factor
            factor = (low + high) / 2
            trial = scaled(factor)
            if abs(count(trial) - wanted) <= abs(found - wanted):
                best = trial
            elif abs(high - low) < 0.02:
                break
        return best

    return inputs_for
