"""Documents, user interfaces, slides and a mostly still clip, drawn with real text: what the pixels stage is for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SIZE = (1008, 1344)
"""Width and height of a page; screens and slides lie on their side."""
TEXT = (
    "the model reads a page of text and counts what repeats between lines of equal length while margins stay white "
    "and figures hold more ink than words or rules so each token must earn its place before the encoder sees it"
)
WORDS = TEXT.split()


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib."""
    return ImageFont.truetype(str(FOLDER / f"{name}.ttf"), size)


def sentence(chance: random.Random, length: int) -> str:
    """Words."""
    return " ".join(chance.choice(WORDS) for _ in range(length)).capitalize() + "."


def lines(
    draw: ImageDraw.ImageDraw, chance: random.Random, box: tuple[int, int, int, int], name: str, size: int
) -> None:
    """Running text in a box, line after line, the last of a paragraph short."""
    left, top, right, bottom = box
    face, step = font(name, size), round(size * 1.5)
    for y in range(top, bottom - step, step):
        text = sentence(chance, 30)
        share = 1.0 if chance.random() < 0.8 else 0.4
        while draw.textlength(text, face) > (right - left) * share:
            text = text[: text.rfind(" ")]
        draw.text((left, y), text, (20, 20, 20), face)


def document(seed: int) -> Image.Image:
    """A page: title, paragraphs in one or two columns, a table or a plot."""
    chance, name = random.Random(f"document {seed}"), FONTS[seed % len(FONTS)]
    page = Image.new("RGB", SIZE, "white")
    draw, (width, height) = ImageDraw.Draw(page), SIZE
    draw.text((90, 80), sentence(chance, 5), "black", font(name, 40))
    columns = 1 + seed % 2
    wide = (width - 180 - 40 * (columns - 1)) // columns
    for column in range(columns):
        left = 90 + column * (wide + 40)
        lines(draw, chance, (left, 170, left + wide, 700 + 80 * column), name, (18, 22)[columns == 1])
    for row in range(7):  # a table
        y = 860 + row * 40
        draw.line((90, y, width - 90, y), (120, 120, 120), 1)
        for cell in range(4):
            draw.text((100 + cell * 210, y + 8), f"{chance.randint(0, 9999) / 10:.1f}", "black", font(name, 18))
    draw.text((width // 2, height - 60), str(seed + 1), "black", font(name, 16))
    return page


def interface(seed: int) -> Image.Image:
    """A window: bar, side list, buttons, a form."""
    chance, name = random.Random(f"interface {seed}"), FONTS[seed % 3]
    ground, bar = chance.choice([((246, 246, 248), (52, 101, 164)), ((32, 33, 36), (60, 64, 67))])
    ink = (235, 235, 235) if ground[0] < 128 else (30, 30, 30)
    page = Image.new("RGB", SIZE[::-1], ground)
    draw, (width, height) = ImageDraw.Draw(page), page.size
    draw.rectangle((0, 0, width, 56), bar)
    draw.text((20, 14), sentence(chance, 3), "white", font(name, 22))
    draw.rectangle((0, 56, 260, height), tuple(max(c - 10, 0) for c in ground))
    for row in range(12):
        draw.text((24, 84 + row * 44), sentence(chance, 2), ink, font(name, 17))
    for row in range(5):
        y = 120 + row * 110
        draw.text((320, y), sentence(chance, 3), ink, font(name, 17))
        draw.rounded_rectangle((320, y + 30, 980, y + 74), 8, "white", (150, 150, 150))
        draw.text((334, y + 41), sentence(chance, 5), (90, 90, 90), font(name, 16))
    for column in range(3):
        x = 320 + column * 200
        draw.rounded_rectangle((x, 760, x + 170, 812), 10, bar)
        draw.text((x + 30, 774), chance.choice(WORDS).capitalize(), "white", font(name, 18))
    return page


def slide(seed: int) -> Image.Image:
    """A slide: title, points, a bar chart."""
    chance, name = random.Random(f"slide {seed}"), FONTS[seed % 2]
    page = Image.new("RGB", SIZE[::-1], "white")
    draw, (width, height) = ImageDraw.Draw(page), page.size
    draw.rectangle((0, 0, width, 14), (192, 57, 43))
    draw.text((80, 70), sentence(chance, 5), (40, 40, 40), font(f"{name}-Bold", 46))
    for row in range(4):
        draw.ellipse((90, 236 + row * 90, 104, 250 + row * 90), fill=(192, 57, 43))
        draw.text((126, 222 + row * 90), sentence(chance, 5), (50, 50, 50), font(name, 30))
    for bar in range(5):
        tall = chance.randint(60, 300)
        draw.rectangle((880 + bar * 80, 820 - tall, 935 + bar * 80, 820), (41, 128, 185))
    draw.line((860, 820, width - 60, 820), (60, 60, 60), 3)
    draw.text((80, height - 70), sentence(chance, 4), (130, 130, 130), font(name, 20))
    return page


def clip(seed: int, frames: int = 16) -> np.ndarray:
    """A slide that is shown while a pointer moves and a line of a caption changes. (T, H, W, 3) uint8."""
    chance, page = random.Random(f"clip {seed}"), slide(seed).resize((672, 504), Image.Resampling.LANCZOS)
    out, text = [], sentence(chance, 6)
    for t in range(frames):
        shot = page.copy()
        draw = ImageDraw.Draw(shot)
        text = sentence(chance, 6) if t % 6 == 5 else text
        draw.rectangle((0, 464, 672, 504), (20, 20, 20))
        draw.text((40, 472), text, "white", font("DejaVuSans", 18))
        x, y = 60 + 34 * t, 120 + 12 * t
        draw.polygon([(x, y), (x, y + 22), (x + 6, y + 16), (x + 15, y + 15)], "black")
        out.append(np.asarray(shot))
    return np.stack(out)


KINDS: dict[str, Callable[[int], Image.Image]] = {"documents": document, "interfaces": interface, "slides": slide}
