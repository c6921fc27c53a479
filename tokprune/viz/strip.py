"""A video as a strip of frames, each with what was kept of it and how much of the budget it got."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout, Selection
from tokprune.types import ImageLike
from tokprune.viz import style
from tokprune.viz.geometry import Geometry, whole
from tokprune.viz.overlay import draw_overlay, indices_of

MARGIN, GAP, BAR, LABEL = 24, 14, 20, 15


def frame_layout(layout: Layout, frame: int) -> tuple[Layout, Tensor]:
    """The layout of one frame alone, and the positions (n,) of its tokens in the stream."""
    where = torch.nonzero(layout.group.cpu() == frame).flatten()
    row, col = layout.row.cpu()[where], layout.col.cpu()[where]
    return Layout(torch.zeros_like(row), row, col, (layout.grids[frame],), "image"), where


def frame_budgets(layout: Layout, kept: Selection | Tensor) -> list[int]:
    """How many tokens of each frame stayed."""
    indices = indices_of(kept, len(layout.group))
    return torch.bincount(layout.group.cpu()[indices], minlength=layout.num_groups).tolist()


def frame_strip(
    frames: Sequence[ImageLike] | NDArray[np.uint8],
    layout: Layout,
    kept: Selection | Tensor,
    geometry: Geometry | None = None,
    *,  # options by name: this is a public entry point
    title: str = "",
    frame_width: int = 220,
    columns: int = 8,
    most: int = 32,
) -> Image.Image:
    """The frames in reading order: kept patches bright, below each a bar of its budget and its number and time.

    frames: PIL pictures or (H, W, 3) arrays; when the model merges neighbouring frames (Qwen: pairs), the middle one of
    each group's frames is shown. kept: the selection, or (K,) indices into the stream. most: at more groups than this,
    evenly spread ones are shown; the bars still compare with the largest budget of all.
    """
    groups = layout.num_groups
    if len(frames) == 0 or len(frames) < groups:
        raise OptionError(f"{len(frames)} frames for a layout of {groups}; give the frames that the model saw.")
    indices = indices_of(kept, len(layout.group))
    budgets, sizes = frame_budgets(layout, indices), layout.group_sizes
    shown = list(range(groups)) if groups <= most else np.linspace(0, groups - 1, most).round().astype(int).tolist()
    cells = []
    for group in shown:
        middle = int((group + 0.5) * (len(frames) / groups))
        picture = style.to_rgb(frames[min(middle, len(frames) - 1)])
        local, where = frame_layout(layout, group)
        mine = torch.nonzero(torch.isin(where, indices)).flatten()
        frame_geometry = geometry or whole((picture.height, picture.width))
        if len(frame_geometry.boxes) > 1:
            frame_geometry = Geometry(frame_geometry.size, (frame_geometry.boxes[group],))
        longest = round(frame_width * max(1.0, picture.height / picture.width))
        cells.append((group, draw_overlay(picture, local, mine, frame_geometry, longest=longest)))
    return _page(cells, budgets, sizes, layout.timestamps, title, frame_width, columns)


def _page(
    cells: list[tuple[int, Image.Image]],
    budgets: Sequence[int],
    sizes: Sequence[int],
    timestamps: Sequence[float] | None,
    title: str,
    width: int,
    columns: int,
) -> Image.Image:
    columns = max(1, min(columns, len(cells)))
    rows = -(-len(cells) // columns)
    height = max(picture.height for _, picture in cells)
    line = style.text_size("x", LABEL)[1]
    step_y = height + BAR + 2 * line + GAP
    inner = columns * width + (columns - 1) * GAP
    subtitle = (
        f"{sum(budgets)} of {sum(sizes)} tokens kept ({100 * sum(budgets) / max(sum(sizes), 1):.3g} "
        f"%), {len(budgets)} frames"
    )
    head = (style.text_size("x", 26)[1] if title else 0) + style.text_size("x", LABEL + 2)[1] + 10
    page = Image.new("RGB", (inner + 2 * MARGIN, MARGIN + head + rows * step_y + MARGIN - GAP), style.PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    if title:
        style.write(draw, (MARGIN, y), style.wrap(title, 26, inner, 1)[0], 26)
        y += style.text_size("x", 26)[1]
    style.write(draw, (MARGIN, y), style.wrap(subtitle, LABEL + 2, inner, 1)[0], LABEL + 2, style.MUTED)
    top = MARGIN + head
    largest = max(max(budgets, default=0), 1)
    for i, (group, picture) in enumerate(cells):
        x, y = MARGIN + i % columns * (width + GAP), top + i // columns * step_y
        page.paste(picture, (x, y))
        base = y + height + BAR
        bar = (x, y + height + 6, x + width - 1, base - 5)
        draw.rectangle(bar, fill=style.RULE)
        if budgets[group]:
            draw.rectangle(
                (*bar[:2], x + max(2, round(width * budgets[group] / largest)) - 1, bar[3]),
                fill=style.STAGES["prefill"],
            )
        seconds = "" if timestamps is None else f", {timestamps[group]:.1f} s"
        style.write(draw, (x, base), style.wrap(f"frame {group + 1}{seconds}", LABEL, width, 1)[0], LABEL)
        amount = f"{budgets[group]} of {sizes[group]} tokens"
        style.write(draw, (x, base + line), style.wrap(amount, LABEL, width, 1)[0], LABEL, style.MUTED)
    return page
