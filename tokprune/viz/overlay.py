"""What was kept, painted on the picture: dropped patches fade to dark, kept ones stay bright, merges get colours.

Parts that the processor cropped away are pale: no token ever saw them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout, Selection
from tokprune.types import ImageLike
from tokprune.viz import style
from tokprune.viz.geometry import Geometry, of_layout, rectangles

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float64]
"""(H, W, 3), 0 to 255."""


def cell_map(boxes: Tensor, size: tuple[int, int], factor: float, members: Tensor) -> NDArray[np.int64]:
    """(H, W) number of the token that lies at each pixel of the picture scaled by `factor`, -1 where there is none.

    boxes: (N, 4) source pixels. members: (M,) tokens to draw, which must not overlap.
    """
    height, width = size
    out = np.full((height, width), -1, dtype=np.int64)
    # Shared edges are rounded alike, so neighbours neither overlap nor leave a gap.
    edges = np.floor(boxes.double().numpy() * factor + 0.5).astype(int)
    for n in members.tolist():
        left, top, right, bottom = edges[n]
        out[top:bottom, left:right] = n
    return out


def outline(labels: NDArray[np.int64] | Mask, width: int) -> Mask:
    """Pixels within `width` of a border between different labels, on both sides."""
    edge = _both(labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1])
    for _ in range(width - 1):
        edge |= _both(edge[1:] | edge[:-1], edge[:, 1:] | edge[:, :-1])
    return edge


def _both(down: Mask, across: Mask) -> Mask:
    """(H, W) of marks (H - 1, W) and (H, W - 1) between neighbours: each marks the pixels on its both sides."""
    out = np.zeros((across.shape[0], down.shape[1]), dtype=bool)
    out[1:] |= down
    out[:-1] |= down
    out[:, 1:] |= across
    out[:, :-1] |= across
    return out


def fade(pixels: Pixels) -> Pixels:
    """Dropped patches: half grey, then most of the way to the shade."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    muted = 0.35 * pixels + 0.65 * grey[..., None]
    return np.asarray(0.3 * muted + 0.7 * np.array(style.SHADE, float))


def unseen(pixels: Pixels) -> Pixels:
    """Parts that never reached the tower (cropped away): grey on the way to paper."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    return np.asarray(0.3 * grey[..., None] + 0.7 * np.array(style.PAPER, float))


def indices_of(kept: Selection | Tensor, total: int) -> Tensor:
    """(K,) the kept tokens of a stream of `total`, on the CPU."""
    indices = (kept.indices if isinstance(kept, Selection) else torch.as_tensor(kept)).detach().cpu().long()
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= total):
        raise OptionError(
            f"kept tokens reach {int(indices.max())}, but the layout has {total}; give indices into the stream."
        )
    return indices


def merge_targets(selection: Selection, total: int) -> Tensor:
    """(N,) the output slot that takes most of each input, -1 for none; without a merge kept ones go to themselves."""
    out = torch.full((total,), -1, dtype=torch.long)
    indices = selection.indices.detach().cpu().long()
    if selection.weights is None:
        out[indices] = torch.arange(len(indices))
        return out
    weights = selection.weights.dense(len(indices), total).detach().cpu()
    best, slot = weights.max(0)
    return torch.where(best > 0, slot, out)


def painted(
    image: ImageLike,
    layout: Layout,
    geometry: Geometry | None,
    longest: int,
    paint: Callable[[Pixels, NDArray[np.int64]], Pixels],
) -> Image.Image:
    """The picture with `longest` pixels on its longer side, painted by where its tokens lie.

    paint: pixels (H, W, 3) and the number of the token at each (H, W), -1 where there is none -> pixels. A tiled
    picture becomes two views side by side, the tiles and the thumbnail. geometry: read off the layout when not given.
    """
    picture = style.to_rgb(image)
    where = geometry or of_layout((picture.height, picture.width), layout)
    if where.size != (picture.height, picture.width):
        raise OptionError(
            f"the geometry is of a {where.size[1]} x {where.size[0]} picture, this one is {picture.width} "
            f"x {picture.height}."
        )
    boxes = rectangles(where, layout)
    large, factor = style.enlarge(picture, longest)
    pixels = np.asarray(large, dtype=float)
    views = []
    for members in _views(layout, where):
        cells = cell_map(boxes, (large.height, large.width), factor, members)
        views.append(Image.fromarray(paint(pixels, cells).round().clip(0, 255).astype(np.uint8)))
    return views[0] if len(views) == 1 else beside(views)


def _views(layout: Layout, geometry: Geometry) -> list[Tensor]:
    """Tokens of each view: groups that lie side by side share one (tiles), the thumbnail has its own, last."""
    group = layout.group.cpu()
    everything = torch.arange(len(group))
    return [everything[group != 0], everything[group == 0]] if geometry.overview else [everything]


def draw_overlay(
    image: ImageLike,
    layout: Layout,
    kept: Selection | Tensor,
    geometry: Geometry | None = None,
    *,
    merged: bool | None = None,
    longest: int = 640,
) -> Image.Image:
    """The picture with its dropped patches faded and the kept ones bright in an amber outline.

    image: the picture as the user gave it (PIL or (H, W, 3) uint8). kept: the selection, or (K,) indices into the
    stream.
    geometry: how the processor mapped it (`geometry.of_processor`); read off the layout when not given.
    merged: colour every patch by the output token it flows into; on by itself when the selection merges. Tiled pictures
    become two views, the tiles and the thumbnail. longest: length of each view's longer side in pixels.
    """
    if layout.kind == "video":
        raise OptionError("this is the layout of a video; draw its frames with tokprune.viz.strip.frame_strip.")
    total = len(layout.group)
    indices = indices_of(kept, total)
    by_source = merged if merged is not None else isinstance(kept, Selection) and kept.weights is not None
    target = merge_targets(kept, total) if by_source and isinstance(kept, Selection) else None

    def paint(pixels: Pixels, cells: NDArray[np.int64]) -> Pixels:
        if target is not None:
            return _paint_merge(pixels, cells, target, indices)
        return _paint_kept(pixels, cells, indices, total)

    return painted(image, layout, geometry, longest, paint)


def line_width(shape: tuple[int, ...]) -> int:
    """Pixels of an outline on a picture of this shape."""
    return max(1, round(max(shape) / 320))


def _paint_kept(pixels: Pixels, cells: NDArray[np.int64], indices: Tensor, total: int) -> Pixels:
    flags = np.zeros(total + 1, dtype=bool)  # the last one answers for -1: no token there
    flags[indices.numpy()] = True
    bright = flags[cells]
    out = np.where(bright[..., None], pixels, fade(pixels))
    out[cells < 0] = unseen(pixels)[cells < 0]
    inner = outline(np.where(bright, cells, -1), 1) & bright  # hairlines between kept neighbours
    out[inner] = 0.75 * out[inner] + 0.25 * np.array(style.SHADE, float)
    edge = outline(bright, line_width(pixels.shape)) & bright
    out[edge] = style.ACCENT
    return out


def _paint_merge(pixels: Pixels, cells: NDArray[np.int64], target: Tensor, indices: Tensor) -> Pixels:
    label = np.append(target.numpy(), -1)[cells]  # (H, W) output slot
    colours = style.distinct(len(indices)).astype(float)
    used = label >= 0
    out = fade(pixels)
    out[cells < 0] = unseen(pixels)[cells < 0]
    out[used] = 0.45 * pixels[used] + 0.55 * colours[label[used]]
    border = outline(label, 1)
    out[border] = 0.4 * out[border] + 0.6 * np.array(style.SHADE, float)
    centre = np.zeros(len(target) + 1, dtype=bool)
    centre[indices.numpy()] = True
    anchored = centre[cells]
    edge = outline(np.where(anchored, cells, -1), line_width(pixels.shape)) & anchored
    out[edge] = 255.0  # the patch whose slot survives
    return out


def beside(views: list[Image.Image], gap: int = 12) -> Image.Image:
    """Pictures in a row, centred in height, on paper."""
    height = max(v.height for v in views)
    out = Image.new("RGB", (sum(v.width for v in views) + gap * (len(views) - 1), height), style.PAPER)
    x = 0
    for view in views:
        out.paste(view, (x, (height - view.height) // 2))
        x += view.width + gap
    return out
