"""The look of all pictures: a few calm colours, one font that Pillow carries, and helpers that keep text legible."""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokprune.files import rgb
from tokprune.types import ImageLike

Colour = tuple[int, int, int]

PAPER: Colour = (250, 250, 248)
INK: Colour = (31, 41, 55)
MUTED: Colour = (107, 114, 128)
RULE: Colour = (222, 224, 228)
ACCENT: Colour = (245, 158, 11)  # outlines of what was kept: amber reads on dark, light and coloured pictures
SHADE: Colour = (24, 30, 41)  # what dropped patches fade into

#: Colours of series and stages that tell apart in print and for most colour-blind readers (after Okabe and Ito, 2008).
SERIES: tuple[Colour, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (148, 103, 189),
    (163, 143, 40),
)
STAGES: dict[str, Colour] = {
    "vision": (86, 141, 188),
    "projector": (140, 186, 214),
    "select": (230, 159, 0),
    "prefill": (0, 135, 108),
    "decode": (138, 191, 150),
    "other": (190, 194, 200),
}


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in scalable font, or its fixed one where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, OSError, ImportError):
        return ImageFont.load_default()


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height in pixels of one line in the font of that size; the height does not depend on the letters."""
    box = font(size).getbbox(text or " ")
    return int(np.ceil(box[2])), int(np.ceil(size * 1.3))


def wrap(text: str, size: int, width: int, lines: int = 3) -> list[str]:
    """`text` broken into at most `lines` lines of `width` pixels; what does not fit ends in three dots."""
    out: list[str] = []
    line = ""
    for word in text.split():
        trial = f"{line} {word}".strip()
        if line and text_size(trial, size)[0] > width:
            out.append(line)
            line = word
        else:
            line = trial
    if line:
        out.append(line)
    if len(out) > lines:
        out = [*out[: lines - 1], " ".join(out[lines - 1 :])]
    return [_cut(part, size, width) for part in out]


def _cut(line: str, size: int, width: int) -> str:
    if text_size(line, size)[0] <= width:
        return line
    fits, longer = 0, len(line)  # bisection: width grows with length
    while longer - fits > 1:
        middle = (fits + longer) // 2
        if text_size(line[:middle] + "...", size)[0] <= width:
            fits = middle
        else:
            longer = middle
    return line[:fits].rstrip() + "..."


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: Colour = INK) -> None:
    """One line of text with its upper left corner at `at`."""
    draw.text(at, text, font=font(size), fill=colour)


def distinct(n: int) -> NDArray[np.uint8]:
    """(n, 3) colours that differ from their neighbours: hues a golden-ratio step apart, always the same ones."""
    out = [
        colorsys.hsv_to_rgb((0.58 + i * 0.618033988749895) % 1.0, (0.55, 0.72, 0.45)[i % 3], (0.92, 0.8, 1.0)[i % 3])
        for i in range(n)
    ]
    return (np.array(out).reshape(n, 3) * 255).round().astype(np.uint8)


def series(n: int) -> list[Colour]:
    """`n` different colours for as many series: those of SERIES, then further hues, dark and light in turn."""
    more = range(max(0, n - len(SERIES)))
    hues = [colorsys.hsv_to_rgb((0.03 + i / max(len(more), 1)) % 1.0, 0.85, (0.45, 0.75)[i % 2]) for i in more]
    return [*SERIES[:n], *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues)]


def ramp(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours of a heat map for values in [0, 1]: deep blue over teal to pale yellow; lightness rises throughout."""
    stops = np.array(
        [[26, 28, 64], [40, 70, 122], [33, 120, 140], [72, 170, 124], [170, 208, 92], [250, 240, 160]], float
    )
    x = np.clip(values, 0, 1) * (len(stops) - 1)
    low = np.minimum(x.astype(int), len(stops) - 2)
    part = (x - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).round().astype(np.uint8)


def to_rgb(image: ImageLike) -> Image.Image:
    """A PIL image, or a (H, W, 3) uint8 array, as an RGB picture; transparency is laid on white."""
    return rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, dtype=np.uint8)))


def enlarge(picture: Image.Image, longest: int) -> tuple[Image.Image, float]:
    """The picture with its longest side at `longest` pixels, and the factor; small ones keep crisp pixels."""
    factor = longest / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    how = Image.Resampling.NEAREST if factor >= 6 else Image.Resampling.LANCZOS
    return picture.resize(size, how), factor
