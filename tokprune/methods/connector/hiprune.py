"""HiPrune: object tokens of a middle layer with their surroundings, the rest from a deep layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune.budget import equal, round_of
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Block, Compat, option
from tokprune.ops.grid import stacks
from tokprune.ops.numeric import wide
from tokprune.ops.topk import top, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def _around(centre: Tensor, grid: tuple[int, int], cell: Tensor) -> Tensor:
    """Which tokens touch a centre from left, right, above or below. centre: (B, N) bool, cell: (B, N) -> (B,
    N) bool.
    """
    height, width = grid
    if centre.shape[1] == height * width:
        c = F.pad(centre.unflatten(1, grid), (1, 1, 1, 1))
        return (c[:, 1:-1, :-2] | c[:, 1:-1, 2:] | c[:, :-2, 1:-1] | c[:, 2:, 1:-1]).flatten(1)
    stride = width + 2  # a border of one cell all around: nothing wraps, nothing needs a clamp
    place = (cell // width + 1) * stride + cell % width + 1
    canvas = torch.zeros(centre.shape[0], (height + 2) * stride, dtype=torch.bool, device=centre.device)
    canvas.scatter_(1, place, centre)
    beside = [canvas.gather(1, place + step) for step in (-1, 1, -stride, stride)]
    return beside[0] | beside[1] | beside[2] | beside[3]


def hiprune(
    object_scores: Tensor,
    deep_scores: Tensor,
    keep: int,
    alpha: float,
    grid: tuple[int, int],
    cell: Tensor | None = None,
    compat: Compat = "corrected",
) -> Tensor:
    """Anchors, buffers, registers (section 3 of the paper).

    object_scores, deep_scores: (B, N) attention received in a middle and in a deep layer. round(keep * alpha / 5)
    anchors lead by the former; their four neighbours are buffers; the rest of the budget leads by the latter. grid:
    (height, width). cell: (B, N) raster place of each token in the grid, None when the grid is full. Returns (B, keep),
    ascending. Where the budget is too small for all, anchors go before buffers, better before worse.
    """
    batch, n = object_scores.shape
    count = round(keep * alpha / 5) if compat == "published" else round_of(keep, alpha / 5)
    anchors = top(object_scores, min(n, count))
    centre = torch.zeros_like(object_scores, dtype=torch.bool).scatter_(1, anchors, True)
    if compat == "published":
        steps = torch.tensor([-1, 1, -grid[1], grid[1]], device=anchors.device)
        beside = (anchors[..., None] + steps).clamp(0, n - 1).flatten(1)
        buffer = torch.zeros_like(centre).scatter_(1, beside, True)
    else:
        places = torch.arange(n, device=anchors.device).expand(batch, n) if cell is None else cell
        buffer = _around(centre, grid, places)
    if 5 * anchors.shape[1] <= keep:  # room for all anchors and buffers, wherever they lie
        return top(deep_scores.masked_fill(centre | buffer, torch.inf), keep)
    tier = torch.where(centre, 2, buffer.long())
    return top_by_tier(tier, torch.where(centre, object_scores, deep_scores), keep)


@register_method(
    "hiprune",
    paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    year=2025,
    url="https://arxiv.org/abs/2508.00553",
    complexity="O(N log N)",
    memory="O(N)",
    checked=Checked(
        "Danielement321/HiPrune",
        agrees='kept tokens with compat="published", anchors at borders included, pictures and tiles',
        differs="neighbours that wrap or are clamped (compat); column sums of its Qwen2.5-VL code",
    ),
    presets={"qwen2_5_vl": {"object_layer": 15, "deep_layer": 31}},
)
@dataclass(frozen=True)
class HiPrune(ConnectorMethod):
    """HiPrune (2025): a middle layer shows objects, a deep layer gathers the whole picture; keep tokens of both.

    alpha: share of the budget for anchors with their neighbours (0.1 in the scripts). object_layer: a block of the
    vision tower, as relative depth; 0.348 is block 8 of CLIP-L's 24 (number 9 in the paper); preset="qwen2_5_vl" reads
    blocks 15 and 31 of Qwen2.5-VL's 32, both of which attend to the whole picture. deep_layer: -2 is its block 22.
    Scores are the attention that a token receives, mean over heads and queries, so a tower without [CLS] will do. Tiles
    and frames get equal budgets, as published.

    What differs from the published code, and comes back with compat="published":
    - Its left and right neighbours wrap into the row above or below.
    - Neighbours outside the picture are clamped to the first or last token, so the corners get in unasked. Its
      Qwen2.5-VL version ranks by column sums, which may exceed one, so that anchors are picked twice and fewer tokens
      than the budget remain; here nothing is picked twice in either mode. It takes the grid width of the first image
      for all.
    """

    alpha: float = option(0.1, low=0, high=1)
    object_layer: Block = 0.348
    deep_layer: Block = -2
    compat: Compat = "corrected"

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"received_attention:{self.object_layer}", f"received_attention:{self.deep_layer}")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        objects, deep = (check_finite(wide(tokens.signal(s)), "the attention values of the tower") for s in self.needs)
        layout = tokens.layout
        sizes = layout.group_sizes
        chosen = []
        for where, count, grid in stacks(sizes, equal(keep, sizes), deep.device, layout.grids):
            cell = (layout.row * grid[1] + layout.col).to(deep.device)[where]
            local = hiprune(objects[where], deep[where], count, self.alpha, grid, cell, self.compat)
            chosen.append(where.gather(1, local).flatten())
        return Selection(torch.cat(chosen).sort().values, info={"scores": deep, "object_scores": objects})
