"""The rules of the pixels methods, written out as loops over single units, and pictures to try them on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "max": lambda a, b: float((a - b).abs().max()),
    "mean": lambda a, b: float((a - b).abs().mean()),
    "rms": lambda a, b: float((a - b).square().mean().sqrt()),
}


def loco(x: Tensor, threshold: float = 0.0, metric: str = "max", anchored: bool = True) -> tuple[Tensor, Tensor]:
    """Kept units and the distance of each to its prediction, (h, w). x: (h, w, P)."""
    far, (h, w, _) = METRICS[metric], x.shape
    stands = [[x[r, c] for c in range(w)] for r in range(h)]
    kept, error = torch.ones(h, w, dtype=torch.bool), torch.full((h, w), torch.inf)
    for r in range(h):
        for c in range(w):
            if r == 0 and c == 0:
                continue
            if r == 0:
                guess = stands[r][c - 1]
            elif c == 0:
                guess = stands[r - 1][c]
            else:
                a, b, corner = stands[r][c - 1], stands[r - 1][c], stands[r - 1][c - 1]
                guess = b if far(corner, a) <= threshold and not far(corner, b) <= threshold else a
            error[r, c] = far(x[r, c], guess)
            if error[r, c] <= threshold:
                kept[r, c] = False
                if anchored:
                    stands[r][c] = guess
    return kept, error


def best(error: Tensor, count: int) -> Tensor:
    """The `count` units of the largest error, the first of equal ones; a mask of the same shape."""
    order = sorted(range(error.numel()), key=lambda i: (-float(error.flatten()[i]), i))
    mask = torch.zeros(error.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view_as(error)


def run_lengths(first: Tensor, last: Tensor, threshold: float, anchored: bool) -> Tensor:
    """Kept units (t, n). first, last: (t, n, P) pixels of the first and last frame of each temporal patch."""
    t, n, _ = first.shape
    kept = torch.ones(t, n, dtype=torch.bool)
    for place in range(n):
        held = 0
        for time in range(1, t):
            before = held if anchored else time - 1
            kept[time, place] = float((first[time, place] - last[before, place]).abs().mean()) > threshold
            held = time if kept[time, place] else held
    return kept


def flood(plain: Tensor, colour: Tensor, threshold: float) -> Tensor:
    """Number of the region's first unit, (h, w). plain: (h, w) bool. colour: (h, w, c)."""
    h, w = plain.shape
    label = torch.arange(h * w).view(h, w)
    seen = torch.zeros(h, w, dtype=torch.bool)
    for r in range(h):
        for c in range(w):
            if seen[r, c] or not plain[r, c]:
                continue
            stack = [(r, c)]
            seen[r, c] = True
            while stack:
                y, x = stack.pop()
                label[y, x] = r * w + c
                for i, j in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    inside = 0 <= i < h and 0 <= j < w and bool(plain[i, j]) and not seen[i, j]
                    if inside and float((colour[i, j] - colour[y, x]).abs().max()) <= threshold:
                        seen[i, j] = True
                        stack.append((i, j))
    return label


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """A plain picture with a rectangle and a patch of noise."""
    chance = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), tuple(int(v) for v in chance.integers(0, 256, 3)))
    x, y = (int(v) for v in chance.integers(0, 16, 2))
    colour = tuple(int(v) for v in chance.integers(0, 256, 3))
    ImageDraw.Draw(picture).rectangle([x, y, x + width // 3, y + height // 4], fill=colour)
    noise = chance.integers(0, 256, (10, 12, 3), dtype=np.uint8)
    picture.paste(Image.fromarray(noise), (width - 16, height - 14))
    return picture


def still(frames: int, width: int = 48, height: int = 40, seed: int = 0) -> np.ndarray:
    """A clip in which a small square moves over a drawn picture. (T, H, W, 3) uint8."""
    clip = np.stack([np.array(drawn(width, height, seed))] * frames)
    for t in range(frames):
        clip[t, 20:28, 4 * (t // 2) : 4 * (t // 2) + 8] = 255
    return clip
