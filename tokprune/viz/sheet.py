"""Several pictures on one page, each with its name and a caption: methods or steps beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from tokprune.errors import OptionError
from tokprune.viz import style

MARGIN, GAP = 28, 22
TITLE, NAME, CAPTION = 30, 22, 17


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
