"""Where a token's patch lies in the source picture: the map that the image processor drew, inverted.

Every processor resizes, crops, pads and tiles; all of that is one axis-aligned box per group (tile, thumbnail or frame): the
part of the source that the group's whole token grid covers. Merging patches (2 x 2 merge, pixel shuffle, pooling) makes the
grid coarser and leaves the box as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout
from tokprune.viz import resolution as res
from tokprune.viz.resolution import Size

Box = tuple[
    float, float, float, float
]  # left, top, right, bottom in source pixels; may reach beyond the picture (padding)


@dataclass(frozen=True)
class Geometry:
    """How a source picture of `size` (height, width) was cut into groups.

    boxes: per group of the layout, what its full grid covers. overview: group 0 shows the whole picture beside the tiles.
    """

    size: Size
    boxes: tuple[Box, ...]
    overview: bool = False

    def fit(self, layout: Layout) -> Geometry:
        """The same geometry with one box per group of `layout`; frames of a video share a box."""
        groups = layout.num_groups
        if len(self.boxes) == groups:
            return self
        if len(self.boxes) == 1:
            return replace(self, boxes=self.boxes * groups)
        raise OptionError(
            f"the geometry has {len(self.boxes)} boxes and the layout {groups} groups; they are not of the same picture."
        )


def rectangles(geometry: Geometry, layout: Layout) -> Tensor:
    """(N, 4) float32 boxes (left, top, right, bottom) of the tokens in source pixels, clipped to the picture.

    A token that lies in padding alone gets a box of no area. Where a model shrank the canvas of its tiles (OneVision), a
    token reaches to its next neighbour, since it stands for the patches between.
    """
    geometry = geometry.fit(layout)
    height, width = geometry.size
    group, row, col = layout.group.cpu(), layout.row.cpu(), layout.col.cpu()
    boxes = torch.tensor(geometry.boxes, dtype=torch.float64)[group]  # (N, 4)
    grids = torch.tensor(layout.grids, dtype=torch.float64)[group]  # (N, 2)
    tall, wide = _reach(layout, group, row, col)
    down, across = (boxes[:, 3] - boxes[:, 1]) / grids[:, 0], (boxes[:, 2] - boxes[:, 0]) / grids[:, 1]
    left, top = boxes[:, 0] + col * across, boxes[:, 1] + row * down
    out = torch.stack([left, top, left + wide * across, top + tall * down], 1)
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    return out.clamp(min=0).minimum(limit).float()


def _reach(layout: Layout, group: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) rows and columns that each token stands for: 1, but up to the next one present on a canvas with gaps."""
    one = torch.ones(len(row), dtype=torch.float64)
    tiled = group >= 1 if layout.thumbnail else torch.ones_like(group, dtype=torch.bool)
    if layout.canvas is None or layout.canvas == (1, 1) or not bool(tiled.any()):
        return one, one.clone()
    tile = group - int(layout.thumbnail)
    rows, cols = layout.grids[-1]
    out = []
    for place in (tile // layout.canvas[1] * rows + row, tile % layout.canvas[1] * cols + col):
        present = torch.unique(place[tiled])
        gap = torch.cat([present.diff(), present.new_ones(1)]).double()
        out.append(torch.where(tiled, gap[torch.searchsorted(present, place).clamp(max=len(present) - 1)], one))
    return out[0], out[1]


def _covered(pixels: int, patch: int | None) -> int:
    """Pixels that whole patches cover; the rest at the right or bottom is never seen by the tower (SigLIP: 378 of 384)."""
    return pixels if patch is None else pixels // patch * patch


def _frame(size: Size, resized: Size, origin: tuple[float, float], seen: Size) -> Box:
    """Box of `seen` pixels from `origin` (top, left) of the resized picture, in source pixels."""
    y, x = size[0] / resized[0], size[1] / resized[1]
    top, left = origin
    return left * x, top * y, (left + seen[1]) * x, (top + seen[0]) * y


def resize_crop(size: Size, edge: int, crop: Size, patch: int | None = None) -> Geometry:
    """CLIP: the shorter side becomes `edge`, then the centre `crop` is cut out (padded with black where too small)."""
    resized = res.shortest_edge(size, edge)
    origin = []
    for have, want in zip(resized, crop, strict=True):
        origin.append(-((want - have) // 2) if want > have else int((have - want) / 2.0))
    seen = (_covered(crop[0], patch), _covered(crop[1], patch))
    return Geometry(size, (_frame(size, resized, (origin[0], origin[1]), seen),))


def stretch(size: Size, to: Size, patch: int | None = None) -> Geometry:
    """SigLIP, Gemma: the whole picture becomes `to`, proportions or not."""
    return Geometry(size, (_frame(size, to, (0, 0), (_covered(to[0], patch), _covered(to[1], patch))),))


def pad_square(size: Size, to: Size, patch: int | None = None) -> Geometry:
    """LLaVA's pad mode: bars make the picture square, then it is scaled to `to`."""
    side = max(size)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    box = stretch((side, side), to, patch).boxes[0]
    return Geometry(size, ((box[0] - left, box[1] - top, box[2] - left, box[3] - top),))


def whole(size: Size) -> Geometry:
    """Qwen-VL: smart resize to whole merged patches, so the grid covers exactly the picture."""
    return Geometry(size, ((0.0, 0.0, float(size[1]), float(size[0])),))


def anyres(
    size: Size, pinpoints: Sequence[Sequence[int]], tile: int, patch: int | None = None, thumbnail: Size | None = None
) -> Geometry:
    """LLaVA-NeXT, OneVision: group 0 is the stretched picture, then the tiles of the padded best resolution in raster order.

    Rows and columns of features in the padding are later cut away; that leaves holes in the tiles' grids, not other boxes.
    """
    target = res.best_resolution(size, pinpoints)
    resized = res.fit_inside(size, target)
    top, left = (target[0] - resized[0]) // 2, (target[1] - resized[1]) // 2
    seen = (_covered(tile, patch), _covered(tile, patch))
    down, across = math.ceil(target[0] / tile), math.ceil(target[1] / tile)
    boxes = [stretch(size, thumbnail or (tile, tile), patch).boxes[0]]
    boxes += [
        _frame(size, resized, (r * tile - top, c * tile - left), seen) for r in range(down) for c in range(across)
    ]
    return Geometry(size, tuple(boxes), True)


def _raster(size: Size, resized: Size, tile: Size, grid: tuple[int, int], patch: int | None) -> list[Box]:
    seen = (_covered(tile[0], patch), _covered(tile[1], patch))
    return [_frame(size, resized, (r * tile[0], c * tile[1]), seen) for r in range(grid[0]) for c in range(grid[1])]


def stretched_tiles(size: Size, canvas: tuple[int, int], tile: Size, patch: int | None = None) -> Geometry:
    """The whole picture stretched onto `canvas` (tiles down, across); group 0 is a thumbnail when there is more than one tile.

    InternVL, Idefics3, SmolVLM, Aya, Ovis2: they differ in how they choose the canvas, and some put the thumbnail last;
    layouts count it first everywhere.
    """
    thumbnail = stretch(size, tile, patch)
    if canvas[0] * canvas[1] <= 1:
        return thumbnail
    boxes = _raster(size, (canvas[0] * tile[0], canvas[1] * tile[1]), tile, canvas, patch)
    return Geometry(size, (thumbnail.boxes[0], *boxes), True)


def dynamic_tiles(size: Size, tile: Size, least: int, most: int, patch: int | None = None) -> Geometry:
    """InternVL: the canvas of the nearest proportions with `least` to `most` tiles."""
    return stretched_tiles(size, res.tile_canvas(size, tile, least, most), tile, patch)


def split_tiles(size: Size, longest: int, tile: int, patch: int | None = None) -> Geometry:
    """Idefics3, SmolVLM: scaled to `longest`, stretched to whole tiles, split."""
    height, width = res.tile_multiple(res.longest_edge(size, longest), tile)
    return stretched_tiles(size, (height // tile, width // tile), (tile, tile), patch)


def pan_and_scan(size: Size, to: Size, crop: int, most: int, ratio: float, patch: int | None = None) -> Geometry:
    """Gemma 3: the whole picture first, then strips of elongated pictures, each stretched to `to`."""
    first = stretch(size, to, patch)
    height, width = size
    along, other = (width, height) if width >= height else (height, width)
    if along / other < ratio:
        return first
    count = min(most, max(2, min(along // crop, math.floor(along / other + 0.5))))
    step = math.ceil(along / count)
    if min(step, other) < crop:
        return first
    boxes = [first.boxes[0]]
    for i in range(count):
        length = min(step, along - i * step)
        part = stretch((height, length) if width >= height else (length, width), to, patch).boxes[0]
        x, y = (i * step, 0) if width >= height else (0, i * step)
        boxes.append((part[0] + x, part[1] + y, part[2] + x, part[3] + y))
    return Geometry(size, tuple(boxes), True)


def _edge(size: Any, key: str) -> int | None:
    if size is None:
        return None
    value = size.get(key) if hasattr(size, "get") else getattr(size, key, None)
    return None if value is None else int(value)


def _target(size: Any) -> Size | None:
    height, width = _edge(size, "height"), _edge(size, "width")
    return None if height is None or width is None else (height, width)


def of_layout(size: Size, layout: Layout) -> Geometry:
    """The geometry when only the layout is known: the whole picture on one grid, or stretched onto the canvas of tiles."""
    if layout.kind == "tiles" and layout.canvas is not None:
        down, across = layout.canvas
        boxes = _raster(size, (down, across), (1, 1), (down, across), None)
        geometry = Geometry(size, (*whole(size).boxes, *boxes) if layout.thumbnail else tuple(boxes), layout.thumbnail)
        if len(geometry.boxes) == layout.num_groups:
            return geometry
    return whole(size)


def of_processor(processor: Any, size: Size, patch_size: int | None = None, layout: Layout | None = None) -> Geometry:
    """The geometry that a transformers processor (or its image processor) gives a picture of `size` (height, width).

    Recognised by what the processor can do, not by its class. patch_size: pixels per patch of the tower, needed where
    patches do not divide the tile (SigLIP 384 / 14); taken from the processor when it knows. layout: of the stream that
    the picture became; its canvas decides for processors that choose canvases in a way of their own. For the layout of a
    video, size is that of a frame.
    """
    image: Any = getattr(processor, "image_processor", None) or processor
    video = layout is not None and layout.kind == "video"
    if video:
        image = getattr(processor, "video_processor", None) or image
    patch = patch_size or getattr(processor, "patch_size", None)
    patch = patch if isinstance(patch, int) else None

    def has(name: str) -> Any:
        return getattr(image, name, None)

    target, shortest = _target(has("size")), _edge(has("size"), "shortest_edge")
    crop, longest = _target(has("crop_size")), _edge(has("size"), "longest_edge")
    canvas = layout.canvas if layout is not None and layout.kind == "tiles" else None
    if video:  # frames are never tiled
        cropped = shortest and crop and has("do_center_crop") is not False
        if has("merge_size") or not (cropped or target):
            return whole(size)
        return (
            resize_crop(size, shortest or 0, crop or (0, 0), patch) if cropped else stretch(size, target or size, patch)
        )
    if has("image_grid_pinpoints"):
        if layout is not None and layout.num_groups == 1:  # one of several pictures: padded to a square, not tiled
            return pad_square(size, target or crop or (shortest or 0,) * 2, patch)
        tile = (crop or target or (shortest or 0, 0))[0]
        return anyres(size, has("image_grid_pinpoints"), tile, patch, target or (tile, tile))
    if has("merge_size") and has("temporal_patch_size"):
        return whole(size)
    if has("do_image_splitting") and longest and (side := _edge(has("max_image_size"), "longest_edge")):
        return split_tiles(size, longest, side, patch)
    if has("crop_to_patches") and target:
        if layout is not None:
            return stretched_tiles(size, canvas or (1, 1), target, patch)
        return dynamic_tiles(size, target, int(has("min_patches")), int(has("max_patches")), patch)
    if has("do_pan_and_scan") and target:
        crop_size, most = int(has("pan_and_scan_min_crop_size")), int(has("pan_and_scan_max_num_crops"))
        return pan_and_scan(size, target, crop_size, most, float(has("pan_and_scan_min_ratio_to_activate")), patch)
    if has("do_pad") and hasattr(image, "pad_to_square") and (crop or target):
        return pad_square(size, crop or target or (0, 0), patch)
    if shortest and crop and has("do_center_crop") is not False:
        return resize_crop(size, shortest, crop, patch)
    if target and canvas is None:
        return stretch(size, target, patch)
    if longest and not shortest and canvas is None:  # Pixtral: scaled down to whole patches
        return whole(size)
    if layout is not None:
        return of_layout(size, layout)
    raise OptionError(
        f"cannot tell how {type(image).__name__} maps a picture to its tiles; give the layout, or build a Geometry by hand: "
        "Geometry(size=(height, width), boxes=((left, top, right, bottom), ...)), one box per tile or frame."
    )
