"""What a reduced vision tower joined, on the picture: each group in its mean colour, with its own outline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.runtime.plan import StreamRecord
from tokprune.tokens import Layout
from tokprune.types import ImageLike
from tokprune.viz import style
from tokprune.viz.geometry import Geometry, whole
from tokprune.viz.overlay import Pixels, fade, line_width, outline, painted, unseen


class MergeTrace(Protocol):
    """What the last run of a tower left behind: `Pruning.trace` is one."""

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each tower picture in places."""
        ...

    def merge_map(self, image: int = 0) -> Tensor:
        """(height, width) group of each place of one tower picture, -1 where it was dropped."""
        ...


def tower_order(layout: Layout, columns: Tensor, candidates: Tensor) -> list[int]:
    """Which picture of the tower each group of a stream is: some towers see the thumbnail last, layouts name it first.

    columns, candidates: of the stream's record (`StreamRecord`): prompt columns in encoder order, and those of the
    tokens as
    `layout` numbers them.
    """
    groups = layout.num_groups
    if len(columns) != len(candidates):  # newline tokens between: such families keep the layout's order
        return list(range(groups))
    rank = torch.searchsorted(columns.cpu().sort().values, candidates.cpu())
    sizes, group = layout.group_sizes, layout.group.cpu()
    first = [int(rank[group == g].min()) for g in range(groups)]
    number = {g: i for i, g in enumerate(sorted(range(groups), key=first.__getitem__))}
    return [number[g] for g in range(groups)] if len(set(sizes)) == 1 else list(range(groups))


def stream_maps(trace: MergeTrace, stream: StreamRecord | None = None) -> list[Tensor]:
    """The merge maps of one picture, one per tile, in the order in which a `Geometry` lists its boxes.

    stream: the record of the picture in the LLM's prompt (`pruning.last.streams[0]`), for towers inside a VLM that saw
    this one picture. Without it: the tower's pictures as they came.
    """
    count = len(trace.cells)
    order = list(range(count)) if stream is None else tower_order(stream.layout, stream.columns, stream.candidates)
    if max(order) >= count:
        raise OptionError(
            f"the stream has {len(order)} tiles, the tower saw {count} pictures; they are not of one call."
        )
    return [trace.merge_map(i) for i in order]


def map_layout(maps: Sequence[Tensor], overview: bool = False) -> tuple[Layout, Tensor]:
    """The layout of the maps' cells, and the (N,) region of each: group numbers made unique over all maps, -1 stays."""
    grids = [(int(m.shape[0]), int(m.shape[1])) for m in maps]
    parts = [Layout.grid(*grid) for grid in grids]
    group = torch.cat([torch.full_like(part.row, i) for i, part in enumerate(parts)])
    row, col = torch.cat([p.row for p in parts]), torch.cat([p.col for p in parts])
    labels, first = [], 0
    for m in maps:
        flat = m.detach().cpu().long().flatten()
        labels.append(torch.where(flat >= 0, flat + first, -1))
        first += int(flat.max()) + 1
    kind = "tiles" if len(maps) > 1 else "image"
    return Layout(group, row, col, tuple(grids), kind, thumbnail=overview), torch.cat(labels)  # type: ignore[arg-type]


def draw_merge_map(
    image: ImageLike, maps: Tensor | Sequence[Tensor], geometry: Geometry | None = None, *, longest: int = 640
) -> Image.Image:
    """The picture in its groups' mean colours: what went into one token has one colour and one outline.

    image: as the user gave it (PIL or (H, W, 3) uint8). maps: (h, w) group numbers of its places, -1 for dropped ones,
    which fade; several for a tiled picture, in the order of the geometry's boxes (`stream_maps`), which become two
    views, tiles and thumbnail. geometry: how the processor mapped the picture (`geometry.of_processor`); the whole of
    it when not given. What was cropped away is pale. longest: length of each view's longer side in pixels.
    """
    listed = [maps] if isinstance(maps, Tensor) else list(maps)
    if not listed or any(m.ndim != 2 for m in listed):
        raise OptionError("a merge map is a (height, width) tensor of group numbers, such as trace.merge_map(0).")
    picture = style.to_rgb(image)
    where = geometry or whole((picture.height, picture.width))
    if len(listed) != len(where.boxes):
        raise OptionError(
            f"{len(listed)} merge maps for a geometry of {len(where.boxes)} boxes; one map per tile, in their order."
        )
    layout, labels = map_layout(listed, where.overview)

    def paint(pixels: Pixels, cells: NDArray[np.int64]) -> Pixels:
        return paint_regions(pixels, np.where(cells >= 0, labels.numpy()[cells], -2))  # -1 dropped, -2 never seen

    return painted(picture, layout, where, longest, paint)


def paint_regions(pixels: Pixels, region: NDArray[np.int64]) -> Pixels:
    """Every region in its mean colour, its edge in a colour of its own. pixels: (H, W, 3), region: (H, W)."""
    out, nothing = fade(pixels), region == -2
    out[nothing] = unseen(pixels)[nothing]
    used = region >= 0
    names, compact = np.unique(region[used], return_inverse=True)
    if not len(names):
        return out
    area = np.bincount(compact, minlength=len(names))
    mean = np.stack([np.bincount(compact, pixels[used][:, c], len(names)) for c in range(3)], 1) / area[:, None]
    out[used] = mean[compact]
    edge = outline(region, line_width(pixels.shape))[used]
    flat = out[used]
    colours = style.distinct(len(names)).astype(float)
    flat[edge] = 0.3 * flat[edge] + 0.7 * colours[compact][edge]
    out[used] = flat
    return out
