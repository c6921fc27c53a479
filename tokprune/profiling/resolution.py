"""How image processors choose sizes: plain arithmetic on (height, width), for pictures and for token counts without
pixels.

Written from the behaviour of the processors of Hugging Face transformers; tests hold both equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]  # (height, width)


def best_resolution(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The candidate (height, width) that keeps most of the picture's pixels, then wastes least (LLaVA-NeXT)."""
    height, width = size
    best: tuple[int, int, int, int] | None = None
    for h, w in pinpoints:
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if best is None or (used, used - h * w) > best[:2]:
            best = (used, used - h * w, int(h), int(w))
    if best is None:
        raise ValueError("no candidate resolutions given.")
    return best[2], best[3]


def smart_resize(size: Size, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """Nearest multiples of `factor` whose area lies between the two bounds (Qwen-VL)."""
    height, width = size
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


def tile_canvas(size: Size, tile: Size, least: int, most: int) -> tuple[int, int]:
    """Tiles down and across: the nearest aspect ratio, with more tiles for larger pictures on ties (InternVL)."""
    height, width = size
    # Sorted by number of tiles, then by columns: the order decides ties.
    grids = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if least <= w * h <= most]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, best_gap = (1, 1), math.inf
    for w, h in grids:
        gap = abs(width / height - w / h)
        if gap < best_gap or (gap == best_gap and height * width > 0.5 * tile[0] * tile[1] * w * h):
            best, best_gap = (w, h), gap
    return best[1], best[0]


def longest_edge(size: Size, edge: int) -> Size:
    """Size with the longer side scaled to `edge`, the shorter rounded down and then up to even (Idefics3, SmolVLM)."""
    height, width = size
    aspect = width / height
    if width >= height:
        height, width = int(edge / aspect), edge
        height += height % 2
    else:
        height, width = edge, int(edge * aspect)
        width += width % 2
    return max(height, 1), max(width, 1)


def tile_multiple(size: Size, tile: int) -> Size:
    """Size rounded up to whole tiles, the longer side first (Idefics3, SmolVLM, before splitting)."""
    height, width = size
    aspect = width / height

    def up(x: int) -> int:
        return math.ceil(x / tile) * tile

    if width >= height:
        width = up(width)
        return up(int(width / aspect)), width
    height = up(height)
    return height, up(int(height * aspect))


def unpadded_grid(grid: Size, size: Size) -> Size:
    """Rows and columns of a feature grid without the padding around a picture of `size` (LLaVA-NeXT, OneVision)."""
    rows, cols = grid
    height, width = size
    if width / height > cols / rows:
        new = int(round(height * (cols / width), 7))
        return rows - 2 * ((rows - new) // 2), cols
    new = int(round(width * (rows / height), 7))
    return rows, cols - 2 * ((cols - new) // 2)
