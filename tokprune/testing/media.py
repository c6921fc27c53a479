"""Pictures and clips for tests: small, seeded, with structure that a resize does not wash out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(width: int = 40, height: int = 40, seed: int = 0) -> Image.Image:
    """A `width` x `height` RGB picture of smooth colour patches; equal seeds give equal pixels."""
    return Image.fromarray(_patches(np.random.default_rng([seed, 1]), 6)).resize(
        (width, height), Image.Resampling.BILINEAR
    )


def clip(frames: int = 4, width: int = 40, height: int = 40, seed: int = 0) -> NDArray[np.uint8]:
    """A video as (frames, height, width, 3) uint8; every frame differs, equal seeds give equal frames."""
    rng = np.random.default_rng([seed, 2])
    shots = [
        Image.fromarray(_patches(rng, 5)).resize((width, height), Image.Resampling.BILINEAR) for _ in range(frames)
    ]
    return np.stack([np.asarray(shot) for shot in shots])


def _patches(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
