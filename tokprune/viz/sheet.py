"""Several pictures on one page, each with its name and a caption: methods or steps beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout, Selection
from tokprune.types import ImageLike
from tokprune.viz import style
from tokprune.viz.geometry import Geometry
from tokprune.viz.overlay import draw_overlay

MARGIN, GAP = 28, 22
LONGEST = 420  # pixels of a panel's longer side
TITLE, NAME, CAPTION = 30, 22, 17
MERGES = "Patches of one colour flow into one token, whose own patch has a white frame."


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet with its name above and a caption below."""

    image: Image.Image
    name: str
    caption: str = ""


def sheet(panels: Sequence[Panel], title: str = "", subtitle: str = "", columns: int | None = None) -> Image.Image:
    """The panels on one page, in rows of `columns` (chosen for a page wider than high when not given)."""
    if not panels:
        raise OptionError("a sheet needs at least one panel.")
    columns = min(columns or _columns(panels), len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    widths = [max(max(row[c].image.width for row in rows if c < len(row)), 160) for c in range(columns)]
    inner = sum(widths) + GAP * (columns - 1)
    captions = {id(p): style.wrap(p.caption, CAPTION, widths[i % columns]) for i, p in enumerate(panels)}
    line = style.text_size("x", CAPTION)[1]
    name_height = style.text_size("x", NAME)[1] + 6
    heights = [
        name_height + max(p.image.height for p in row) + 8 + line * max(len(captions[id(p)]) for p in row)
        for row in rows
    ]
    header = style.wrap(title, TITLE, inner, 2), style.wrap(subtitle, CAPTION, inner, 3)
    title_line = style.text_size("x", TITLE)[1]
    top = MARGIN + title_line * len(header[0]) + line * len(header[1]) + (16 if title or subtitle else 0)
    page = Image.new("RGB", (inner + 2 * MARGIN, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN), style.PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for text in header[0]:
        style.write(draw, (MARGIN, y), text, TITLE)
        y += title_line
    for text in header[1]:
        style.write(draw, (MARGIN, y), text, CAPTION, style.MUTED)
        y += line
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = MARGIN
        for column, panel in enumerate(row):
            style.write(draw, (x, y), style.wrap(panel.name, NAME, widths[column], 1)[0] if panel.name else "", NAME)
            page.paste(panel.image, (x, y + name_height))
            below = y + name_height + panel.image.height + 8
            for text in captions[id(panel)]:
                style.write(draw, (x, below), text, CAPTION, style.MUTED)
                below += line
            x += widths[column] + GAP
        y += height + GAP
    return page


def _columns(panels: Sequence[Panel]) -> int:
    """Columns that bring the page near 16 : 10 and leave few places empty."""
    width = max(p.image.width for p in panels) + GAP
    height = max(p.image.height for p in panels) + 80

    def cost(columns: int) -> tuple[float, int]:
        rows = math.ceil(len(panels) / columns)
        empty = rows * columns - len(panels)
        return abs(math.log(columns * width / (rows * height) / 1.6)) + 0.5 * empty, columns

    return min(range(1, len(panels) + 1), key=cost)


def method_sheet(
    image: ImageLike,
    layout: Layout,
    selections: Mapping[str, Selection | Tensor],
    geometry: Geometry | None = None,
    *,  # options by name: this is a public entry point
    title: str = "",
    subtitle: str = "",
    captions: Mapping[str, str] | None = None,
    longest: int = LONGEST,
    columns: int | None = None,
) -> Image.Image:
    """The picture, then what each method kept of it. captions: a line per method (an answer, a time) after the count.

    selections: by the name to print, each a Selection or (K,) indices into the stream that `layout` describes.
    """
    original, _ = style.enlarge(style.to_rgb(image), longest)
    count, more = f"{len(layout.group)} tokens", (captions or {}).get("input", "")
    panels = [Panel(original, "input", f"{count}, {more}" if more else count)]
    for name, kept in selections.items():
        panels.append(method_panel(image, layout, kept, geometry, name, captions, longest))
    if any(isinstance(kept, Selection) and kept.weights is not None for kept in selections.values()):
        subtitle = f"{subtitle}. {MERGES}" if subtitle else MERGES
    return sheet(panels, title, subtitle, columns)


def method_panel(
    image: ImageLike,
    layout: Layout,
    kept: Selection | Tensor,
    geometry: Geometry | None,
    name: str,
    captions: Mapping[str, str] | None = None,
    longest: int = LONGEST,
) -> Panel:
    """What one method kept, with its name and the count."""
    picture = draw_overlay(image, layout, kept, geometry, longest=longest)
    return Panel(picture, name, kept_text(kept, layout, captions, name))


def kept_text(kept: Selection | Tensor, layout: Layout, captions: Mapping[str, str] | None, name: str) -> str:
    """ "58 of 576 tokens (10.1 %)", and the caption of that name."""
    count, total = len(kept), len(layout.group)
    note, more = f"{count} of {total} tokens ({100 * count / total:.3g} %)", (captions or {}).get(name, "")
    return f"{note}, {more}" if more else note
