"""MustDrop's merge in the tower: plain windows of the picture become their mean behind the first block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Place, Reduction
from tokprune.methods.options import option
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.ops.topk import ranks
from tokprune.registry import Checked, register_method


def windows(side: int, window: int, device: torch.device) -> Tensor:
    """Patches of each whole window x window square of the grid, in raster order. (G, window²)"""
    cells = torch.arange(side * side, device=device).view(side, side)
    return cells.unfold(0, window, window).unfold(1, window, window).flatten(0, 1).flatten(1)


def window_similarity(patches: Tensor) -> Tensor:
    """Mean cosine of the pairs within each window. patches: (B, G, m, C), m > 1 -> (B, G) in float32."""
    rows, m = unit(patches), patches.shape[2]
    own = rows.square().sum((-1, -2))  # the pairs of a patch with itself, 1 each but for a patch of zeros
    return (rows.sum(2).square().sum(-1) - own) / (m * (m - 1))


def merged_order(similarity: Tensor, count: Tensor, cells: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Where the output rows sit and into which each patch flows, with the `count` most similar windows merged.

    similarity: (B, G), count: (B,), cells: (G, m) as `windows` gives them. Output: merged windows, most similar first
    and at the window's middle patch, then the other patches in raster order. Returns (B, K), -1 for padding, and (B,
    patches).
    """
    batch, groups = similarity.shape
    device = similarity.device
    rank = ranks(similarity)
    merges = rank < count[:, None]  # (B, G)
    group = torch.full((patches,), -1, device=device)
    group[cells.flatten()] = torch.arange(groups, device=device).repeat_interleave(cells.shape[1])
    inside = (group >= 0) & merges[:, group.clamp(min=0)]  # (B, N)
    alone = (~inside).cumsum(1) - 1 + count[:, None]
    assign = torch.where(inside, rank[:, group.clamp(min=0)], alone)
    width = patches - (cells.shape[1] - 1) * int(count.min())
    spare = torch.full((batch, width + 1), -1, device=device)
    middle = cells[:, (cells.shape[1] - 1) // 2].expand(batch, -1)
    rep = spare.scatter(1, torch.where(merges, rank, width), middle)
    rep = rep.scatter(1, torch.where(inside, width, assign), torch.arange(patches, device=device).expand(batch, -1))
    return rep[:, :width], assign


@register_method(
    "mustdrop_merge",
    paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    year=2024,
    url="https://arxiv.org/abs/2411.10803",
    complexity="O(NC)",
    memory="O(NC)",
    merges=True,
    adaptive=True,
    checked=Checked(
        "liuting20/MustDrop",
        agrees="windows, means, sizes and the order of the output for one picture",
        differs="each picture of a batch has its own number of windows (there the smallest of them)",
    ),
)
@dataclass(frozen=True)
class MustDropMerge(EncoderMethod):
    """MustDrop (2024), its part in the tower: behind the first block, windows of near-equal patches become their mean.

    window: side of the squares that the grid is cut into; what no whole square covers stays. threshold: mean cosine of
    a window's patches from which it merges; 3 and 0.8 as published. `ratio` or `budget`: as many of the most similar
    windows merge as leave at most so many patches, whatever the threshold says. block: behind which it happens. Merged
    windows come first, the most similar one at the front, then the other patches in raster order; in a VLM each sits
    at the window's middle. proportional: attention counts a merged window by its size; the published code does not.
    The count depends on the picture, and a batch is padded to its busiest one (in the published code every picture of a
    batch merges as many windows as the one with the fewest). For towers with a square grid.
    """

    window: int = option(3, low=2)
    threshold: float = option(0.8, low=-1, high=1)
    block: int = option(0, low=0)
    proportional: bool = False
    place: ClassVar[Place] = "end"

    def active(self, index: int, depth: int) -> bool:
        return index == self.block

    def check(self, depth: int, target: bool) -> None:
        if self.block >= depth:
            raise OptionError(f"block={self.block} is not in a tower of {depth} blocks (0 to {depth - 1}).")

    def reduce(self, block: BlockView) -> Reduction | None:
        n, prefix = block.patches, block.prefix
        side = math.isqrt(n)
        if side * side != n or side < self.window:
            raise OptionError(
                f"mustdrop_merge needs a square grid of at least {self.window} x {self.window}, not {n} patches."
            )
        cells = windows(side, self.window, block.x.device)
        similarity = window_similarity(wide(block.x)[:, prefix:][:, cells])  # (B, G)
        if block.target is None:
            count = (similarity >= self.threshold).sum(1)
        else:
            each = cells.shape[1] - 1
            wanted = -((block.target - n) // each)  # rounded up
            if wanted > len(cells):
                least = n - each * len(cells)
                raise OptionError(f"{block.target} of {n} patches cannot be reached: at least {least} are left.")
            count = torch.full_like(similarity[:, 0], max(wanted, 0), dtype=torch.long)
        if not bool(count.any()):
            return None
        rep, assign = merged_order(similarity, count, cells, n)
        head = torch.arange(prefix, device=rep.device).expand(len(rep), -1)
        rep, assign = (torch.cat([head, torch.where(y >= 0, y + prefix, -1)], 1) for y in (rep, assign))
        size, x = block.sizes(), wide(block.x)
        total = size.new_zeros(*rep.shape, 1).scatter_add(1, assign[..., None], size)
        index = assign[..., None].expand_as(x)
        mean = x.new_zeros(*rep.shape, x.shape[2]).scatter_add(1, index, x * size) / total.clamp(min=1)
        return Reduction(mean.to(block.x.dtype), rep, assign, total)
