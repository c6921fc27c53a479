"""GlobalCom2: the thumbnail tells how much, and what, each high-resolution crop should keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import share_out
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Block, option
from tokprune.ops.numeric import wide
from tokprune.ops.topk import group_sum, top_in_groups
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, Selection, VisualTokens


def crop_scales(thumbnail: Tensor, tiles: tuple[int, int], ratio: float, temperature: float = 10.0) -> Tensor:
    """Keep ratio of each crop from the sum of the thumbnail's scores in its region.

    thumbnail: (H, W) scores. tiles: (down, across). Returns (down * across,), raster order: min(1, ratio * (1 +
    softmax(sum / temperature) - its mean)), so that ratios spread around `ratio`.
    """
    height, width = thumbnail.shape
    down, across = tiles
    row = torch.arange(height, device=thumbnail.device) // max(1, height // down)
    col = torch.arange(width, device=thumbnail.device) // max(1, width // across)
    region = row.clamp(max=down - 1)[:, None] * across + col.clamp(max=across - 1)
    sums = thumbnail.new_zeros(down * across).index_add_(0, region.flatten(), thumbnail.flatten())
    spread = (sums / temperature).softmax(0)
    return (ratio * (1 + spread - spread.mean())).clamp(max=1.0)


def seen_at(thumbnail: Tensor, place: Tensor, first: Tensor, extent: Tensor) -> Tensor:
    """The thumbnail's scores at places of the canvas, bilinear. It shows the picture alone, not the padding of the
    canvas.

    thumbnail: (H, W). place: (N, 2) rows and columns of the canvas. first, extent: (2,) where the picture begins on the
    canvas and how many rows and columns it has. Returns (N,), outside the picture the value of its edge.
    """
    last = torch.tensor(tuple(thumbnail.shape), device=place.device) - 1
    at = (place - first + 0.5 * thumbnail.new_ones(2)) * ((last + 1).to(thumbnail) / extent) - 0.5
    at = at.clamp_min(0).minimum(last.to(thumbnail.dtype))
    low = at.floor().long()
    high, part = (low + 1).minimum(last), at - low
    rows = torch.stack([low[:, 0], high[:, 0]], 1)[:, :, None]  # (N, 2, 1)
    cols = torch.stack([low[:, 1], high[:, 1]], 1)[:, None, :]  # (N, 1, 2)
    share = torch.stack([1 - part, part], -1)  # (N, 2, 2): axis, low or high
    return (thumbnail[rows, cols] * share[:, 0, :, None] * share[:, 1, None, :]).sum((1, 2))


def _group_norm(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Each token's value over the L2 norm of its group. values: (N,) -> (N,)."""
    return values / group_sum(values.square(), group, groups).sqrt().clamp_min(torch.finfo(values.dtype).tiny)


@register_method(
    "globalcom2",
    paper="Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large "
    "Vision-Language Models",
    year=2026,
    url="https://arxiv.org/abs/2501.05179",
    complexity="O(N log N)",
    memory="O(N)",
    checked=Checked(
        "xuyang-liu16/GlobalCom2",
        agrees="scales and scores, with and without padding, and so the kept tokens of every crop once counts are "
        "those",
        differs="the method meets an exact budget (there each crop is rounded down); newlines of padding rows",
    ),
)
@dataclass(frozen=True)
class GlobalCom2(ConnectorMethod):
    """GlobalCom2 (AAAI 2026): crops keep more where the thumbnail is interested, by their own and the thumbnail's
    scores.

    Scores are the [CLS] row before softmax, mean over heads, of the block `layer` ("-1", the last). temperature: 10 as
    published. For tiled images with a thumbnail: the thumbnail keeps the overall ratio, crop t that ratio times its
    scale, and the shares are rounded to the exact budget. Other streams (one tile, no thumbnail, video) have no global
    guide: every group keeps the same ratio by its own scores.

    What differs from the published code, without a compat mode since counts cannot be both: it rounds each crop's count
    down on its own; it keeps the newline of every canvas row, also of padding rows, where our separators follow the
    framework's rule and cost nothing of `keep`; it moves the tokens of a padded crop up and left before they are put in
    raster order, where ours stay in place; it feeds the thumbnail in order of score and casts to float16. The
    thumbnail's regions are equal parts, as there, also where padding moves the border between tiles. It reads wrong
    scores from the second image of a batch on, and its LLaVA-1.5 path fails.
    """

    layer: Block = -1
    temperature: float = option(10.0, above=0)

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
        place = torch.stack([tile // across * h + row, tile % across * w + col], 1)  # the thumbnail's own mean nothing
        begin = place.masked_fill((group == 0)[:, None], down * h + across * w).amin(0)
        extent = place.masked_fill((group == 0)[:, None], -1).amax(0) + 1 - begin
        seen = seen_at(thumbnail, place, begin, extent)
        both = _group_norm(own, group, layout.num_groups) + _group_norm(seen, group, layout.num_groups)
        scales = crop_scales(thumbnail, canvas, ratio, self.temperature)
        return torch.cat([scales.new_full((1,), ratio), scales]), torch.where(group == 0, own, both)


def _regular(grids: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> bool:
    """Whether the groups are a thumbnail and a full canvas of equal crops."""
    return len(grids) == 1 + canvas[0] * canvas[1] and len(set(grids[1:])) == 1
