"""Where a token's patch lies in the source picture, found by sending a picture of coordinates through the real
processor.

Every processor resizes, crops, pads and tiles; all of that is one axis-aligned box per group (tile, thumbnail or
frame): the part of the source that the group's whole token grid covers. Merging patches (2 x 2 merge, pixel shuffle,
pooling) makes the grid coarser and leaves the box as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout
from tokprune.types import Inputs, Processor

Size = tuple[int, int]  # (height, width)
Box = tuple[
    float, float, float, float
]  # left, top, right, bottom in source pixels; may reach beyond the picture (padding)


@dataclass(frozen=True)
class Geometry:
    """How a source picture of `size` (height, width) was cut into groups.

    boxes: per group of the layout, what its full grid covers. overview: group 0 shows the whole picture beside the
    tiles.
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
            f"the geometry has {len(self.boxes)} boxes and the layout {groups} groups; they are not of the same "
            f"picture."
        )


def rectangles(geometry: Geometry, layout: Layout) -> Tensor:
    """(N, 4) float32 boxes (left, top, right, bottom) of the tokens in source pixels, clipped to the picture.

    A token that lies in padding alone gets a box of no area. Where a model shrank the canvas of its tiles (OneVision),
    a token reaches to its next neighbour, since it stands for the patches between.
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


def whole(size: Size) -> Geometry:
    """The grid covers exactly the picture (Qwen-VL, Pixtral: resized to whole patches)."""
    return Geometry(size, ((0.0, 0.0, float(size[1]), float(size[0])),))


def of_layout(size: Size, layout: Layout) -> Geometry:
    """The geometry when only the layout is known: the whole picture on one grid, or on a canvas of tiles."""
    if layout.kind == "tiles" and layout.canvas is not None:
        down, across = layout.canvas
        tall, wide = size[0] / down, size[1] / across
        boxes = [(c * wide, r * tall, (c + 1) * wide, (r + 1) * tall) for r in range(down) for c in range(across)]
        geometry = Geometry(size, (*whole(size).boxes, *boxes) if layout.thumbnail else tuple(boxes), layout.thumbnail)
        if len(geometry.boxes) == layout.num_groups:
            return geometry
    return whole(size)


SPLITTERS = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan")  # options that cut a picture into tiles


def of_processor(
    processor: Processor, size: Size, patch_size: int | None = None, layout: Layout | None = None
) -> Geometry:
    """The geometry that a transformers processor (or its image processor) gives a picture of `size` (height, width).

    A picture whose colours are its coordinates goes through the processor; what comes out says where each view was cut.
    patch_size: pixels per patch of the tower, needed where patches do not divide the view (SigLIP 384 / 14); taken from
    the processor when it knows. layout: of the stream that the picture became, which tells whether it was cut into
    tiles. For the layout of a video, size is that of a frame. Raises OptionError for a processor that cannot be traced
    when there is no layout to go by.
    """
    image = getattr(processor, "image_processor", None) or processor
    if layout is not None and layout.kind == "video":
        image = getattr(processor, "video_processor", None) or image
    patch = patch_size or getattr(processor, "patch_size", None)
    boxes = _traced(image, size, layout, patch if isinstance(patch, int) else None)
    if boxes is None:
        if layout is not None:
            return of_layout(size, layout)
        raise OptionError(
            f"cannot tell how {type(image).__name__} maps a picture to its tiles; give the layout, or build a "
            f"Geometry by hand: Geometry(size=(height, width), boxes=((left, top, right, bottom), ...)), one box per "
            f"tile or frame."
        )
    overview = next((i for i in (0, len(boxes) - 1) if len(boxes) > 1 and _shows_all(boxes[i], size)), None)
    if overview is not None:  # layouts count the thumbnail first, wherever the processor puts it
        boxes.insert(0, boxes.pop(overview))
    if layout is not None and len(boxes) not in (1, layout.num_groups):
        return of_layout(size, layout)
    return Geometry(size, tuple(boxes), overview is not None)


def _coordinates(size: Size) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: red grows from left to right, green from top to bottom, blue is full where the picture is."""
    height, width = size
    out = np.full((height, width, 3), 255, np.uint8)
    out[..., 0] = np.rint((np.arange(width) + 0.5) / width * 255)
    out[..., 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
    return out


def _traced(image: Callable[..., Inputs], size: Size, layout: Layout | None, patch: int | None) -> list[Box] | None:
    """What each view covers that an image or video processor makes of the picture of coordinates, in its own order.

    None when it cannot be called with a picture, or makes something else than pictures of it.
    """
    picture = _coordinates(size)
    if layout is not None and layout.kind == "video":
        boxes = _views(image, size, patch, videos=[np.stack([picture] * 4)], do_sample_frames=False)
        if boxes is not None:
            return boxes[:1]
    tiled = layout is None or (layout.num_groups > 1 and layout.kind == "tiles")
    splitting = {} if layout is None else {name: tiled for name in SPLITTERS if hasattr(image, name)}
    boxes = _views(image, size, patch, images=[Image.fromarray(picture)], **splitting)
    if (
        boxes is not None and len(boxes) > 1 and not tiled
    ):  # OneVision cuts a picture only where it is the prompt's only one
        pair = _views(image, size, patch, images=[[Image.fromarray(picture)] * 2], **splitting)
        boxes = boxes if pair is None or len(pair) != 2 else pair[:1]
    return boxes


def _views(image: Callable[..., Inputs], size: Size, patch: int | None, **call: object) -> list[Box] | None:
    """The boxes of all views that a call of the processor returns; those of padding alone are left out."""
    try:
        out = image(**call, do_normalize=False, return_tensors="pt")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError):
        return None  # processors refuse in many ways; the layout alone then says where tokens lie
    if any(name.endswith("grid_thw") for name in out):
        return list(whole(size).boxes)  # packed patches of a picture that was resized to whole patches
    pixels = next((out[name] for name in ("pixel_values", "pixel_values_videos") if name in out), None)
    if not isinstance(pixels, Tensor) or pixels.dim() < 4 or pixels.shape[-3] != 3:
        return None
    views = pixels.double().flatten(0, -4)  # (views, 3, h, w)
    views = views / views[:, 2].max().clamp(min=1e-6)
    cuts = [_box(view, size) for view in views if bool((view[2] > 0.99).any())]
    boxes = [_covered(box, (views.shape[-2], views.shape[-1]), patch) for box in cuts if box is not None]
    return boxes if boxes and len(boxes) == len(cuts) else None


def _box(view: Tensor, size: Size) -> Box | None:
    """What a view (3, h, w) of the picture of coordinates shows, padding included; None when it is no such view."""
    there = view[2] > 0.99  # blue is full where the picture is, and less in padding
    left_right = _span(view[0], there, size[1])
    top_bottom = _span(view[1].T, there.T, size[0])
    if left_right is None or top_bottom is None:
        return None
    return left_right[0], top_bottom[0], left_right[1], top_bottom[1]


def _span(values: Tensor, there: Tensor, length: int) -> tuple[float, float] | None:
    """First and last source coordinate along the columns of values (h, w), by a straight line through them."""
    count = there.sum(0)
    mean = (values * there).sum(0) / count.clamp(min=1) * length  # (w,) source coordinate at each column
    # At the border of the picture interpolation repeats the last pixel: no line there.
    use = (count > 0) & (mean > 1) & (mean < length - 1) if length > 4 else count > 0
    place = torch.arange(len(mean), dtype=torch.double) + 0.5
    if int(use.sum()) < 2:
        return None
    x, y = place[use], mean[use]
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    start = float(y.mean() - slope * x.mean())
    miss = float((y - (start + slope * x)).abs().max())
    return (start, start + slope * len(mean)) if slope > 0 and miss < max(1.5 * slope, 0.02 * length) else None


def _covered(box: Box, pixels: tuple[int, int], patch: int | None) -> Box:
    """The part of a view's box that whole patches cover; the rest (SigLIP: 6 of 384 px) is never seen."""
    if patch is None:
        return box
    down, across = (n // patch * patch / n for n in pixels)
    return box[0], box[1], box[0] + (box[2] - box[0]) * across, box[1] + (box[3] - box[1]) * down


def _shows_all(box: Box, size: Size) -> bool:
    """Whether a view is of the whole picture."""
    slack = 0.02
    across, down = slack * size[1], slack * size[0]
    return box[0] < across and box[1] < down and box[2] > size[1] - across and box[3] > size[0] - down
