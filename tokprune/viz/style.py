"""The look of all pictures: a few calm colours, one font that Pillow carries, and helpers that keep text legible."""

from __future__ import annotations

import bisect
import colorsys
import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

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


#: Fonts with letters that the built-in one lacks, as Pillow finds them by name in the folders of the system.
WIDER = (
    *("NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSansCJK-Regular.ttc"),
    *("NotoSansDevanagari-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansThai-Regular.ttf", "wqy-zenhei.ttc"),
    *("PingFang.ttc", "msyh.ttc", "malgun.ttf", "YuGothM.ttc", "Nirmala.ttf", "unifont.otf"),
)


@lru_cache(maxsize=256)
def _wider(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font of the system, or of matplotlib where it is installed; None where there is none of that name."""
    found = find_spec("matplotlib")
    folders = [Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"] if found and found.origin else []
    for path in (name, *(str(folder / name) for folder in folders)):
        try:
            return ImageFont.truetype(path, size)
        except OSError:
            continue
    return None


@lru_cache(maxsize=4096)
def _drawn(letter: str, name: str) -> bool:
    """Whether a font has a letter: it draws it otherwise than a code point that no font has."""
    used = font(20) if not name else _wider(name, 20)
    if used is None:
        return False
    return letter.isspace() or bytes(used.getmask(letter)) != bytes(used.getmask("\U0010ffff"))


def runs(text: str) -> list[tuple[str, str]]:
    """Parts of a line with the font that has their letters, "" being the built-in one. Letters that no font here has
    are counted in words, in place of boxes.
    """
    out: list[tuple[str, str]] = []
    for letter in text:
        last = out[-1][1] if out else ""
        has = next((f for f in (last, "", *WIDER) if f != NOWHERE and _drawn(letter, f)), NOWHERE)
        if out and (has == last or letter.isspace() or unicodedata.category(letter)[0] == "M"):  # marks join a letter
            out[-1] = (out[-1][0] + letter, last)
        else:
            out.append((letter, has))
    return [(_counted(part), "") if name == NOWHERE else (part, name) for part, name in out]


def _counted(part: str) -> str:
    return f"[{len(part.strip())} letters that no font here has]" + part[len(part.rstrip()) :]


NOWHERE = "?"


def text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height in pixels of one line in the font of that size; the height does not depend on the letters."""
    width = sum(_font(name, size).getbbox(part or " ")[2] for part, name in runs(text or " "))
    return int(np.ceil(width)), int(np.ceil(size * 1.3))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return (_wider(name, size) if name else None) or font(size)


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
    lengths = range(1, len(line))
    fits = bisect.bisect_right(lengths, width, key=lambda n: text_size(line[:n] + "...", size)[0])
    return line[:fits].rstrip() + "..."


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: Colour = INK) -> None:
    """One line of text with its upper left corner at `at`."""
    x, y = at
    for part, name in runs(text):
        used = _font(name, size)
        down = _ascent(font(size)) - _ascent(used) if name else 0  # one base line
        draw.text((x, y + down), part, font=used, fill=colour)
        x += int(np.ceil(used.getbbox(part)[2]))


def _ascent(used: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(used.getmetrics()[0]) if isinstance(used, ImageFont.FreeTypeFont) else 0


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
