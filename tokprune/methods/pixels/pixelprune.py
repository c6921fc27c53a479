"""PixelPrune: units that a causal neighbour predicts need not be encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.pixels_base import Metric, PixelMethod, PixelUnits, Prediction, distance
from tokprune.registry import Checked, register_method


def by_neighbours(x: Tensor, threshold: float, metric: Metric) -> tuple[Tensor, Tensor]:
    """Each unit's distance to the neighbour that predicts it, and that neighbour, by the neighbours' own pixels.

    The rule of LOCO-I with A left, B above and C above left: B where C is similar to A and not to B, else A; the first
    row is predicted from the left, the first column from above. x: (M, h, w, P) -> (M, h, w) each.
    """
    m, h, w, _ = x.shape
    left, up = x.new_full((m, h, w), torch.inf), x.new_full((m, h, w), torch.inf)
    left[:, :, 1:], up[:, 1:] = distance(x[:, :, 1:], x[:, :, :-1], metric), distance(x[:, 1:], x[:, :-1], metric)
    use_up = torch.zeros(m, h, w, dtype=torch.bool, device=x.device)
    use_up[:, 1:, 1:] = (up[:, 1:, :-1] <= threshold) & ~(left[:, :-1, 1:] <= threshold)  # (C, A) and (C, B)
    use_up[:, 1:, 0] = True
    place = torch.arange(h * w, device=x.device).view(h, w)
    source = torch.where(use_up, place - w, place - 1)
    source[:, 0, 0] = 0
    return torch.where(use_up, up, left), source


def by_reconstructions(x: Tensor, threshold: float, metric: Metric) -> tuple[Tensor, Tensor]:
    """The same where a dropped unit is replaced by what predicted it, so that errors do not add up (anchored).

    A unit needs those to the left, above and above left, so each anti-diagonal of the grid is decided at once.
    """
    m, h, w, _ = x.shape
    pixels = x.flatten(1, 2)  # (M, h * w, P)
    stands = torch.arange(h * w, device=x.device).repeat(m, 1)  # (M, h * w) the kept unit in the place of each
    source, far = stands.clone(), x.new_full((m, h * w), torch.inf)
    batch = torch.arange(m, device=x.device)[:, None]
    for diagonal in range(1, h + w - 1):
        row = torch.arange(max(0, diagonal - w + 1), min(diagonal, h - 1) + 1, device=x.device)
        here, top, first = row * w + diagonal - row, row == 0, row == diagonal
        a, b, c = (stands[:, (here - step).clamp(min=0)] for step in (1, w, w + 1))  # (M, n) each
        at_a, at_b, at_c = (pixels[batch, unit] for unit in (a, b, c))
        use_up = (distance(at_c, at_a, metric) <= threshold) & ~(distance(at_c, at_b, metric) <= threshold)
        use_up = (use_up & ~top) | first
        guess = torch.where(use_up, b, a)
        error = distance(pixels[:, here], torch.where(use_up[..., None], at_b, at_a), metric)
        far[:, here], source[:, here] = error, guess
        stands[:, here] = torch.where(error <= threshold, guess, here)
    return far.view(m, h, w), source.view(m, h, w)


@register_method(
    "pixelprune",
    paper="PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding",
    year=2026,
    url="https://arxiv.org/abs/2604.00886",
    complexity="O(NP)",
    memory="O(NP)",
    adaptive=True,
    checked=Checked(
        "OPPO-Mente-Lab/PixelPrune",
        agrees="kept units, anchored and not, at thresholds 0 to 0.2 by all three metrics, on 432 runs of random grids",
        differs="anchored tolerance by anti-diagonals instead of a loop; exact counts are ours; no serpentine scan, no "
        "connected components; the raster scan compares own pixels alone",
    ),
)
@dataclass(frozen=True)
class PixelPrune(PixelMethod):
    """PixelPrune (arXiv 2604.00886): repeated pixels are not encoded. Each frame of a clip is a picture of its own.

    threshold: 0 drops exact repetitions alone; up to about 0.1 in the paper. metric: of the distance between units.
    anchored: neighbours that were dropped stand with the pixels that replaced them. scan: "loco" predicts from the
    left, above and above left; "raster" drops a unit that is similar to the one before it, row after row, and compares
    own pixels. With `ratio` or `budget` units are ranked by their distance to the prediction from own pixels (ours).
    """

    metric: Metric = "max"
    anchored: bool = True
    scan: Literal["loco", "raster"] = "loco"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scan == "raster" and self.anchored and self.threshold > 0:
            raise OptionError(
                "scan='raster' compares a unit with the pixels of the one before it; write anchored=False beside a "
                "threshold above 0, or take scan='loco'."
            )

    def predict(self, units: PixelUnits, ranked: bool) -> Prediction:
        t, h, w = units.grid
        x = units.values.flatten(2).unflatten(1, (t, h * w)).flatten(0, 1)  # (B * t, h * w, P of all frames)
        if self.scan == "raster":
            far, source = by_neighbours(x[:, None], self.threshold, self.metric)
        else:
            rule = by_neighbours if ranked or not self.anchored or self.threshold == 0 else by_reconstructions
            far, source = rule(x.unflatten(1, (h, w)), self.threshold, self.metric)
        return Prediction.by_frame(far.flatten(1), source.flatten(1), t)
