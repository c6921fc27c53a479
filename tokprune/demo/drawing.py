"""Pixels of the demo scenes: textured background, clutter, and objects with characters (Pillow and NumPy)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .scenes import SceneObject

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (48, 92, 222),
    "yellow": (240, 208, 48),
    "purple": (142, 62, 190),
    "orange": (243, 134, 36),
    "cyan": (60, 200, 214),
    "pink": (245, 150, 190),
}
_DARK_INK = frozenset({"yellow", "cyan", "pink", "orange"})  # light fills carry dark characters
_SUPERSAMPLING = 3

# Outlines in units of the radius, for the shapes that are not regular polygons.
_DIAMOND = ((0.0, -1.25), (0.85, 0.0), (0.0, 1.25), (-0.85, 0.0))
_ARM = 0.42
_CROSS = (
    (-_ARM, -1.15), (_ARM, -1.15), (_ARM, -_ARM), (1.15, -_ARM), (1.15, _ARM), (_ARM, _ARM),
    (_ARM, 1.15), (-_ARM, 1.15), (-_ARM, _ARM), (-1.15, _ARM), (-1.15, -_ARM), (-_ARM, -_ARM),
)  # fmt: skip


def render(objects: Sequence[SceneObject], seed: int, size: int, plain: bool = False) -> Image.Image:
    """Draw a scene: background and clutter first, so that they never hide an object.

    Args:
        objects: what to draw, in this order.
        seed: fixes the background, the clutter and the small variation of colours.
        size: height and width in pixels.
        plain: before a ground of one colour, without clutter, as on a slide.
    """
    return render_frames([objects], seed, size, plain)[0]


def render_frames(
    frames: Sequence[Sequence[SceneObject]], seed: int, size: int, plain: bool = False
) -> list[Image.Image]:
    """Draw the frames of one take: the same objects, in the same order, at other places before one background.

    Args:
        frames: the objects of each frame; only their places may differ.
        seed: as in `render`; a take of one frame is that picture.
        size: height and width in pixels.
        plain: as in `render`.
    """
    rng = random.Random(f"drawing {seed}")
    background = _background(rng, np.random.default_rng(seed), size)
    if plain:
        background = Image.new("RGB", (size, size), background.resize((1, 1)).getpixel((0, 0)))
    else:
        _draw_clutter(background, rng)
    sprites = [_sprite(obj, rng) for obj in frames[0]]
    images = []
    for objects in frames:
        image = background.copy()
        for obj, sprite in zip(objects, sprites, strict=True):
            half = sprite.width // 2
            image.paste(sprite, (round(obj.x - half), round(obj.y - half)), sprite)
        images.append(image)
    return images


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _regular(corners: int, radius: float, angle: float) -> list[tuple[float, float]]:
    steps = (angle + 2 * math.pi * i / corners for i in range(corners))
    return [(radius * math.cos(a), radius * math.sin(a)) for a in steps]


def _outline(shape: str, radius: float, rotation: float) -> list[tuple[float, float]]:
    """Corner points of a shape around (0, 0)."""
    if shape == "square":
        return _regular(4, 1.12 * radius, math.pi / 4 + rotation)
    if shape == "hexagon":
        return _regular(6, 1.05 * radius, rotation)
    if shape == "triangle":
        return [(x, y + 0.12 * radius) for x, y in _regular(3, 1.3 * radius, -math.pi / 2 + rotation)]
    if shape == "star":
        outer = _regular(5, 1.3 * radius, -math.pi / 2 + rotation)
        inner = _regular(5, 0.62 * radius, -math.pi / 2 + rotation + math.pi / 5)
        return [point for pair in zip(outer, inner, strict=True) for point in pair]
    if shape in ("diamond", "cross"):
        cos, sin = math.cos(rotation), math.sin(rotation)
        points = _DIAMOND if shape == "diamond" else _CROSS
        return [(radius * (x * cos - y * sin), radius * (x * sin + y * cos)) for x, y in points]
    raise ValueError(f"unknown shape {shape!r}")


def _sprite(obj: SceneObject, rng: random.Random) -> Image.Image:
    """One object with its character on a transparent square, drawn large and reduced for smooth edges."""
    half = math.ceil(1.4 * obj.radius) + 1
    width = 2 * half * _SUPERSAMPLING
    centre, radius = width / 2, obj.radius * _SUPERSAMPLING
    fill = tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in COLORS[obj.color])
    sprite = Image.new("RGBA", (width, width), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sprite)
    if obj.shape == "circle":
        draw.ellipse((centre - radius, centre - radius, centre + radius, centre + radius), fill=(*fill, 255))
    else:
        outline = _outline(obj.shape, radius, obj.rotation)
        draw.polygon([(centre + x, centre + y) for x, y in outline], fill=(*fill, 255))
    if obj.character:
        ink = (15, 15, 15, 255) if obj.color in _DARK_INK else (250, 250, 250, 255)
        drop = 0.12 * radius if obj.shape == "triangle" else 0.0
        draw.text(
            (centre, centre + drop),
            obj.character,
            font=_font(int(obj.character_size * _SUPERSAMPLING)),
            fill=ink,
            anchor="mm",
            stroke_width=1,
            stroke_fill=ink,
        )
    return sprite.resize((2 * half, 2 * half), Image.Resampling.BILINEAR)


def _background(rng: random.Random, noise: np.random.Generator, size: int) -> Image.Image:
    """A greyish gradient with, by chance, stripes, and always some grain."""
    base = noise.uniform(70, 185, 3) * 0.35 + noise.uniform(70, 185) * 0.65
    coarse = noise.normal(0, 16, (5, 5, 1)) + noise.normal(0, 5, (5, 5, 3))
    coarse_image = Image.fromarray(np.clip(coarse + 128, 0, 255).astype(np.uint8))
    smooth = np.asarray(coarse_image.resize((size, size), Image.Resampling.BICUBIC), np.float32) - 128
    pixels = base + smooth  # (H, W, 3)
    if rng.random() < 0.5:
        rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
        angle, frequency = rng.random() * math.pi, rng.uniform(0.12, 0.6)
        wave = np.sin(frequency * (columns * math.cos(angle) + rows * math.sin(angle)))
        pixels = pixels + (rng.uniform(4, 18) * wave)[..., None]
    pixels = pixels + noise.normal(0, rng.uniform(2, 10), (size, size, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_clutter(image: Image.Image, rng: random.Random) -> None:
    """Grey strokes and small grey blobs: they draw attention, yet no question asks about them."""
    draw, size = ImageDraw.Draw(image), image.width
    for _ in range(rng.randint(1, 8)):
        x, y, angle = rng.random() * size, rng.random() * size, rng.random() * 2 * math.pi
        length, grey = rng.uniform(8, 40), rng.choice((20, 60, 210, 240))
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line((x, y, *end), fill=(grey, grey, grey), width=rng.choice((1, 1, 2)))
    for _ in range(rng.randint(0, 4)):
        x, y, radius = rng.random() * size, rng.random() * size, rng.uniform(1.5, 4.5)
        grey = rng.choice((25, 60, 200, 235))
        corners = [(x + dx, y + dy) for dx, dy in _regular(rng.randint(3, 6), radius, rng.random() * math.pi)]
        draw.polygon(corners, fill=(grey, grey, grey))
