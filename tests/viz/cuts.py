"""Geometries of the usual kinds, as real processors make them, for tests that only draw."""

from __future__ import annotations

import transformers as hf

from tokprune.tokens import Layout
from tokprune.viz.geometry import Geometry, Size, of_processor

SQUARE = {"height": 48, "width": 48}


def cropped(size: Size) -> Geometry:
    """Shorter side scaled to 48, centre cut out."""
    return of_processor(hf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE), size, 8)


def padded(size: Size) -> Geometry:
    """Bars make it square, then it is scaled to 48."""
    options = {"size": {"shortest_edge": 48}, "crop_size": SQUARE, "do_pad": True}
    return of_processor(hf.LlavaImageProcessor(**options), size, 8)


def stretched(size: Size) -> Geometry:
    """Scaled to 48 x 48, proportions or not."""
    return of_processor(hf.SiglipImageProcessor(size=SQUARE), size, 8)


def tiled(size: Size, canvas: tuple[int, int]) -> Geometry:
    """A thumbnail and tiles of 48 x 48, as InternVL cuts a picture whose proportions are those of `canvas`."""
    count = canvas[0] * canvas[1]
    processor = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=count, max_patches=count)
    layout = Layout.grid(6, 6, count + 1, "tiles", canvas=canvas, thumbnail=True)
    return of_processor(processor, size, 8, layout)
