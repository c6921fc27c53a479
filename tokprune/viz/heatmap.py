"""A signal (attention, a method's scores) as colours over the picture, with a legend of their values."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout
from tokprune.types import ImageLike
from tokprune.viz import style
from tokprune.viz.geometry import Geometry
from tokprune.viz.overlay import Pixels, painted, unseen

LEGEND, LABEL = 14, 15


def scaled(values: Tensor, clip: float = 0.01) -> tuple[NDArray[np.float64], float, float]:
    """Values as (N,) in [0, 1] between two quantiles, and those two; NaN and infinity count as the ends."""
    flat = values.detach().double().cpu()
    flat = torch.where(flat.isnan(), -torch.inf, flat)
    finite = flat[torch.isfinite(flat)]
    if finite.numel() == 0:
        return np.zeros(len(flat)), 0.0, 0.0
    low, high = torch.quantile(finite, torch.tensor([clip, 1 - clip], dtype=torch.float64)).tolist()
    span = high - low
    if span <= 0:
        return np.full(len(flat), 0.5), low, high
    return ((flat - low) / span).clamp(0, 1).numpy(), low, high


def draw_heatmap(
    image: ImageLike,
    layout: Layout,
    values: Tensor,
    geometry: Geometry | None = None,
    *,
    name: str = "",
    strength: float = 0.7,
    longest: int = 640,
) -> Image.Image:
    """The picture under a colour per token: dark blue is low, pale yellow high; parts that no token saw are pale grey.

    values: (N,) one number per token of the stream; higher is brighter, NaN is as if no token saw the place. name: what
    the numbers are, for the legend. strength: how much of the colour covers the picture. Tiled pictures become two
    views, the tiles and the thumbnail.
    """
    if values.ndim != 1 or len(values) != len(layout.group):
        raise OptionError(
            f"values have shape {tuple(values.shape)}; give one number per token, ({len(layout.group)},), "
            "such as a signal averaged over its heads."
        )
    level, low, high = scaled(values)
    colours = style.ramp(level).astype(float)
    known = ~values.detach().isnan().cpu().numpy()

    def paint(pixels: Pixels, cells: NDArray[np.int64]) -> Pixels:
        grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
        out, seen = unseen(pixels), (cells >= 0) & known[cells]
        out[seen] = (1 - strength) * grey[seen] + strength * colours[cells[seen]]
        return out

    return _with_legend(painted(image, layout, geometry, longest, paint), low, high, name)


def _with_legend(picture: Image.Image, low: float, high: float, name: str) -> Image.Image:
    line = style.text_size("x", LABEL)[1]
    page = Image.new("RGB", (picture.width, picture.height + LEGEND + line + 18), style.PAPER)
    page.paste(picture, (0, 0))
    width = min(picture.width - 8, 320)
    bar = style.ramp(np.linspace(0, 1, width))[None].repeat(LEGEND, 0)
    top = picture.height + 8
    page.paste(Image.fromarray(bar), (4, top))
    draw = ImageDraw.Draw(page)
    low_text, high_text = f"{low:.3g}", f"{high:.3g}"
    style.write(draw, (4, top + LEGEND + 3), low_text, LABEL, style.MUTED)
    right = width + 4 - style.text_size(high_text, LABEL)[0]
    style.write(draw, (right, top + LEGEND + 3), high_text, LABEL, style.MUTED)
    if name and picture.width - width > 60:
        text = style.wrap(name, LABEL, picture.width - width - 14, 1)[0]
        style.write(draw, (width + 14, top - 2), text, LABEL)
    return page
