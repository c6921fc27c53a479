"""GlobalCom2: the thumbnail tells how much, and what, each high-resolution crop should keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.ops.ranking import group_sum, top_in_groups
from tokprune.ops.shares import share_out
from tokprune.ops.wide import wide
from tokprune.registry import register_method
from tokprune.tokens import Layout, Selection, VisualTokens


def crop_scales(thumbnail: Tensor, tiles: tuple[int, int], ratio: float, temperature: float = 10.0) -> Tensor:
    """Keep ratio of each crop from the sum of the thumbnail's scores in its region.

    thumbnail: (H, W) scores. tiles: (down, across). Returns (down * across,), raster order: min(1, ratio * (1 + softmax(sum /
    temperature) - its mean)), so that ratios spread around `ratio`.
    """
    height, width = thumbnail.shape
    down, across = tiles
    row = torch.arange(height, device=thumbnail.device) // max(1, height // down)
    col = torch.arange(width, device=thumbnail.device) // max(1, width // across)
    region = row.clamp(max=down - 1)[:, None] * across + col.clamp(max=across - 1)
    sums = thumbnail.new_zeros(down * across).index_add_(0, region.flatten(), thumbnail.flatten())
    spread = (sums / temperature).softmax(0)
    return (ratio * (1 + spread - spread.mean())).clamp(max=1.0)


def guide(thumbnail: Tensor, tiles: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The thumbnail's scores at the crops' resolution. thumbnail: (H, W), grid: (h, w) of a crop -> (down * h, across * w)."""
    size = (tiles[0] * grid[0], tiles[1] * grid[1])
    return F.interpolate(thumbnail[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _group_norm(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Each token's value over the L2 norm of its group. values: (N,) -> (N,)."""
    return values / group_sum(values.square(), group, groups).sqrt().clamp_min(torch.finfo(values.dtype).tiny)


@register_method(
    "globalcom2",
    paper="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language Models",
    year=2026,
    url="https://arxiv.org/abs/2501.05179",
    complexity="O(N log N)",
)
@dataclass(frozen=True)
class GlobalCom2(ConnectorMethod):
    """GlobalCom2 (AAAI 2026): crops keep more where the thumbnail is interested, by their own and the thumbnail's scores.

    Scores are the [CLS] row before softmax, mean over heads, of the block `layer` ("-1", the last). temperature: 10 as published.
    For tiled images with a thumbnail: the thumbnail keeps the overall ratio, crop t that ratio times its scale, and the
    shares are rounded to the exact budget. Other streams (one tile, no thumbnail, video) have no global guide: every group
    keeps the same ratio by its own scores.

    What differs from the published code, without a compat mode since counts cannot be both: it rounds each crop's count
    down on its own; it keeps the newline of every canvas row, also of padding rows, where our
    separators follow the framework's rule and cost nothing of `keep`; it feeds the thumbnail in order of score and casts to
    float16; norms run over a crop with its padding, here over its candidates. It reads wrong scores from the second image of
    a batch on, and its LLaVA-1.5 path fails.
    """

    layer: str = "-1"
    temperature: float = 10.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise OptionError(f"temperature={self.temperature!r} is not above 0; 10 is the published one.")

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"cls_logits:{self.layer}",)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        own = check_finite(wide(tokens.signal(self.needs[0])), "the [CLS] scores of the vision tower")
        layout = tokens.layout
        group = layout.group.to(own.device)
        sizes = torch.tensor(layout.group_sizes, device=own.device)
        weights, scores = sizes.to(own.dtype), own
        if layout.thumbnail and layout.canvas is not None and _regular(layout.grids, layout.canvas):
            scales, scores = self._guided(own, layout, layout.canvas, keep / len(tokens))
            weights = weights * scales
        quota = share_out(keep, weights[None], sizes)
        return Selection(top_in_groups(scores, group, quota[0], keep), info={"scores": scores, "quota": quota[0]})

    def _guided(self, own: Tensor, layout: Layout, canvas: tuple[int, int], ratio: float) -> tuple[Tensor, Tensor]:
        """Keep ratio of each group (G,) and score of each token (N,) under the thumbnail's guidance."""
        down, across = canvas
        group = layout.group.to(own.device)
        height, width = layout.grids[0]
        row, col = layout.row.to(own.device), layout.col.to(own.device)
        first = layout.group_sizes[0]
        thumbnail = own.new_zeros(height, width).index_put((row[:first], col[:first]), own[:first])
        h, w = layout.grids[1]
        tile = (group - 1).clamp_min(0)
        canvas_row = (tile // across * h + row).clamp(max=down * h - 1)  # the thumbnail's own tokens look up nonsense,
        canvas_col = (tile % across * w + col).clamp(max=across * w - 1)  # which the last line throws away
        seen = guide(thumbnail, canvas, (h, w))[canvas_row, canvas_col]
        both = _group_norm(own, group, layout.num_groups) + _group_norm(seen, group, layout.num_groups)
        scales = crop_scales(thumbnail, canvas, ratio, self.temperature)
        return torch.cat([scales.new_full((1,), ratio), scales]), torch.where(group == 0, own, both)


def _regular(grids: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> bool:
    """Whether the groups are a thumbnail and a full canvas of equal crops."""
    return len(grids) == 1 + canvas[0] * canvas[1] and len(set(grids[1:])) == 1
