"""ToFu: ToMe's matching; early blocks drop the similar tokens, late ones merge them without losing length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import even_steps
from tokprune.errors import OptionError
from tokprune.methods.encoder.tome import merge_schedule
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Reduction
from tokprune.methods.options import Block, option
from tokprune.ops.merge import Matching, bipartite_matching, merge, merge_weighted
from tokprune.registry import Checked, register_method


def norm_merge(
    matching: Matching, x: Tensor, size: Tensor | None = None, by_destination: bool = False
) -> tuple[Tensor, Tensor]:
    """MLERP: the mean of each row's inputs, stretched to the length of its longest input (section 3.2).

    x: (B, N, C), size: (B, N, 1) or None -> (B, K, C) in x's dtype and sizes (B, K, 1). Rows without company stay as
    they are. by_destination: divide by the length of the destination before merging, not of the mean, as the copy in
    PiToMe's repository does.
    """
    mean, total = merge_weighted(matching, x, size)
    wide = x if x.dtype == torch.float64 else x.float()
    norm = wide.norm(dim=-1, keepdim=True)
    longest = merge(matching, norm, "amax")
    length = (
        norm.gather(1, matching.rep[..., None]) if by_destination else mean.to(wide.dtype).norm(dim=-1, keepdim=True)
    )
    length = length.clamp_min(torch.finfo(wide.dtype).tiny)
    company = merge(matching, torch.ones_like(norm), "sum") > 1
    return torch.where(company, (mean * (longest / length)).to(x.dtype), mean), total


@register_method(
    "tofu",
    paper="Token Fusion: Bridging the Gap between Token Pruning and Token Merging",
    year=2024,
    url="https://arxiv.org/abs/2312.01026",
    complexity="O(LN²d)",
    memory="O(NC)",
    merges=True,
    checked=Checked(
        "",
        differs="no official code; the copy in hchautran/PiToMe divides by another norm and switches one block later",
    ),
)
@dataclass(frozen=True)
class ToFu(EncoderMethod):
    """ToFu (WACV 2024): blocks before `switch` drop the r most similar tokens, later ones merge them keeping the norm
    (MLERP).

    Early blocks are far from linear, so that a mean of tokens is none of theirs; there dropping costs less. r: tokens
    removed per block, or a list; without it `ratio` or `budget` decides (before a connector method the square root of
    the ratio, as in ToMe). switch: first merging block, 0-based or a fraction of the depth; 6 of 12 in the paper. There
    is no official code; the copy in PiToMe's repository divides by another norm and switches one block later.
    """

    r: int | tuple[int, ...] | None = option(
        None, low=0, example=8, hint="It is how many tokens a block merges, or one number per block: r=(16, 8, 0)."
    )
    switch: Block = 0.5
    proportional: bool = True

    @property
    def scheduled(self) -> bool:
        return self.r is not None

    def check(self, depth: int, target: bool) -> None:
        if (self.r is None) != target:
            given = "both r and a ratio or budget are" if target else "neither r nor a ratio or budget is"
            raise OptionError(f"{given} given; write r=8 (removed per block), or ratio=0.5 (left in the end).")

    def active(self, index: int, depth: int) -> bool:
        return self.r is None or merge_schedule(self.r, depth)[index] > 0

    def reduce(self, block: BlockView) -> Reduction | None:
        if self.r is not None:
            r = merge_schedule(self.r, block.depth)[block.index]
        else:
            r = even_steps(0 if block.target is None else block.start - block.target, block.depth)[block.index]
        if r <= 0:
            return None
        matching = bipartite_matching(block.metric(), r, block.prefix)
        switch = self.switch * block.depth if isinstance(self.switch, float) else self.switch
        if block.index >= switch:
            x, size = norm_merge(matching, block.x, block.size)
            return Reduction(x, matching.rep, matching.assign, size)
        return Reduction.kept(block, matching.rep)
