"""EViT: keep the patches that [CLS] looks at, fold the others into one token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import ceil_of, geometric_counts
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Reduction, at_depths
from tokprune.methods.options import Block, Compat, option
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method


def attentive(cls_attention: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Patches with the most attention from [CLS], best first, and the others in ascending order; ties to the lower
    index.

    cls_attention: (B, n) -> (B, keep) and (B, n - keep).
    """
    order = torch.sort(cls_attention, dim=-1, descending=True, stable=True).indices
    return order[:, :keep], order[:, keep:].sort(-1).values


def inattentive_token(x: Tensor, cls_attention: Tensor, dropped: Tensor) -> Tensor:
    """The dropped patches as one token: their sum weighted by attention, not normalised (section 3.3).

    x: (B, n, C), cls_attention: (B, n), dropped: (B, m) -> (B, 1, C) in x's dtype.
    """
    rows = rows_at(x, dropped)
    weight = cls_attention.gather(1, dropped)
    return (weight[:, None] @ rows.to(weight.dtype)).to(x.dtype)


@register_method(
    "evit",
    paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    year=2022,
    url="https://arxiv.org/abs/2202.07800",
    complexity="O(NC)",
    memory="O(NC)",
    merges=True,
    checked=Checked(
        "youweiliang/evit",
        agrees="blocks and a whole model, with and without the fused token",
        differs='kept patches stay in raster order (compat="published": best first)',
    ),
)
@dataclass(frozen=True)
class EViT(EncoderMethod):
    """EViT (ICLR 2022): at a few blocks, between attention and MLP, the patches with the most attention from [CLS]
    stay.

    keep: share of patches that stays at each of `blocks` (rounded up); with `ratio` or `budget` the share is computed
    from it. blocks: 0-based, or fractions of the depth; 3, 6 and 9 of 12 in the paper. fuse: the others become one
    token, which counts as a patch from then on and sits at the place of the one with the most attention; not where a
    budget leaves a single patch. The paper trains with it; applied to a finished model it costs more accuracy than
    merging. A tower without [CLS] ranks by the attention that patches receive. Kept patches stay in raster order;
    compat="published" puts the best first, as the published code does (the outputs are the same but for their order).
    """

    keep: float = option(0.7, above=0, high=1)
    blocks: tuple[Block, ...] = option((0.25, 0.5, 0.75), filled=True)
    fuse: bool = True
    compat: Compat = "corrected"

    def check(self, depth: int, target: bool) -> None:
        at_depths(self.blocks, depth)

    def active(self, index: int, depth: int) -> bool:
        return index in at_depths(self.blocks, depth)

    def reduce(self, block: BlockView) -> Reduction | None:
        blocks, n = at_depths(self.blocks, block.depth), block.patches
        keep = math.ceil(self.keep * n) if self.compat == "published" else ceil_of(n, self.keep)
        fuse = self.fuse
        if block.target is not None:
            left = geometric_counts(block.start, block.target, len(blocks))[blocks.index(block.index)]
            fuse = fuse and left > 1
            keep = n if left >= n else left - fuse
        if keep >= n:
            return None
        attention = block.cls_attention().mean(1)  # (B, n)
        kept, dropped = attentive(attention, keep)
        if self.compat != "published":
            kept = kept.sort(-1).values
        out = Reduction.kept_patches(block, kept)
        if not fuse:
            return out
        fused = inattentive_token(block.x[:, block.prefix :], attention, dropped)
        return out.with_rest(block, fused, dropped, attention)
