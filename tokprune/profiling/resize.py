"""Pictures of another size: smaller ones, the honest rival of pruning, and prompts of a wanted number of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokprune.errors import OptionError
from tokprune.profiling.presets import Preset
from tokprune.profiling.resolution import Size
from tokprune.scaling import scaled_picture
from tokprune.types import Inputs

AtScale = Callable[[float], Inputs]  # factor of height and width -> inputs
MOST = 64.0  # a picture is made larger or smaller by at most this factor


def scaled_frames(frames: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """The frames (T, H, W, 3) uint8 of a clip, each scaled."""
    return np.stack([np.asarray(scaled_picture(Image.fromarray(frame), factor)) for frame in frames])


def at_count(
    at_scale: AtScale, count: Callable[[Inputs], int], wanted: float, full: int | None = None, steps: int = 12
) -> tuple[Inputs, int]:
    """Inputs with about `wanted` visual tokens, and how many they have: the nearest that a search over picture sizes
    finds.

    at_scale: factor -> inputs, 1 being the picture as given. count: inputs -> visual tokens. full: the count at factor
    1, where it is known. Tokens grow with the area, in steps; processors that make a fixed number give that.
    """
    if wanted < 1:
        raise OptionError(f"{wanted:g} visual tokens; ask for at least 1.")
    first = full if full is not None else count(at_scale(1.0))
    factor = min(max(math.sqrt(wanted / max(first, 1)), 1 / MOST), MOST)
    low, high = 1 / MOST, MOST
    best, best_count = None, 0
    seen = {first}
    for step in range(steps):
        trial = at_scale(factor)
        got = count(trial)
        if best is None or abs(got - wanted) < abs(best_count - wanted):
            best, best_count = trial, got
        if abs(got - wanted) <= max(0.5, 0.02 * wanted):
            break
        seen.add(got)
        if step >= 2 and len(seen) == 1:  # a processor that makes a fixed number
            break
        low, high = (low, min(high, factor)) if got > wanted else (max(low, factor), high)
        # A step towards the count if it stays inside what is known, else the middle of it.
        guess = factor * math.sqrt(wanted / max(got, 1))
        factor = guess if low < guess < high and step < 4 else math.sqrt(low * high)
        if high / low < 1.004:
            break
    assert best is not None
    return best, best_count


def shrinking(
    at_scale: AtScale, count: Callable[[Inputs], int], full: int | None = None, whole: int | None = None
) -> AtScale:
    """A function from a keep ratio to inputs of the picture or clip scaled down until it gives about so many.

    full: the count at factor 1, where it is known. whole: the count that ratios are of, `full` unless told otherwise.
    Processors that make a fixed number of tokens give that at any size.
    """
    known = count(at_scale(1.0)) if full is None else full
    return lambda ratio: at_count(at_scale, count, max(1.0, ratio * (whole or known)), known)[0]


def preset_size(known: Preset, wanted: int, frames: int | None = None) -> tuple[Size, int]:
    """The picture size (height, width) that gives a preset the nearest to `wanted` candidate tokens, and that number.

    The usual proportions first; others, up to six times as wide as high, where those come much nearer (tiles of
    InternVL depend on the proportions alone).
    """
    if wanted < 1:
        raise OptionError(f"{wanted} visual tokens; ask for at least 1.")
    shapes: list[Size] = [known.default_size, *((448, 448 * k) for k in range(1, 7))]
    best: tuple[int, Size, int] | None = None
    for height, width in shapes:
        guess = math.sqrt(wanted / known.tokens((height, width), frames))
        for step in sorted(range(-160, 161), key=abs):
            factor = min(max(guess * 1.01**step, 1 / MOST), MOST)
            size = (max(1, round(height * factor)), max(1, round(width * factor)))
            got = known.tokens(size, frames)
            if best is None or abs(got - wanted) < best[0]:
                best = (abs(got - wanted), size, got)
            if got == wanted:
                break
        assert best is not None
        if best[0] <= 0.02 * wanted:
            break
    assert best is not None
    return best[1], best[2]
