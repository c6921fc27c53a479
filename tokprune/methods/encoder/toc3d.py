"""ToC3D's router: salient tokens run through the blocks, the others ride along with one token that stands for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import round_of
from tokprune.errors import OptionError
from tokprune.methods.base import top
from tokprune.methods.encoder_base import BlockView, Cut, EncoderMethod, Place, Reduction, at_depths
from tokprune.methods.options import Block, option
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method


def representative(x: Tensor, scores: Tensor, others: Tensor) -> Tensor:
    """One token for many: their mean weighted by score. x: (B, N, C), scores: (B, N), others: (B, M) -> (B, 1, C)."""
    weight = scores.gather(1, others)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    rows = rows_at(x, others)
    return (weight[:, None] @ rows.to(weight.dtype)).to(x.dtype)


@register_method(
    "toc3d",
    paper="Make Your ViT-based Multi-view 3D Detectors Faster via Token Compression",
    year=2024,
    url="https://arxiv.org/abs/2409.00633",
    complexity="O(NC)",
    memory="O(NC)",
    checked=Checked(
        "DYZhang09/ToC3D",
        differs="scores by object queries, windows and its three stages; the router follows the paper",
    ),
)
@dataclass(frozen=True)
class ToC3D(EncoderMethod):
    """ToC3D's router (ECCV 2024) with a score that needs no training: no token is lost, but only salient ones are
    computed.

    keep: share of the patches that runs through the blocks behind block `first` (0-based or a fraction of the depth).
    The others are joined to one representative, weighted by score, which runs with them; at the tower's end each of the
    others has moved as the representative has. The paper scores by object queries of earlier frames, learned with
    boxes; a VLM has none, so here the attention from [CLS] ranks, or what patches receive where there is no [CLS]. The
    tower's output has full length, so the connector and the LLM see all tokens.

    The paper routes in three stages from block 6 of 24 on, each of which ranks all patches anew and computes another
    share of them (0.7, 0.5, 0.5 in its "fast" models, 0.5, 0.4, 0.3 in its "faster" ones), window by window; here one
    stage computes the same patches to the end. Its code weighs the representative by log-probabilities, so that the
    least salient patches weigh most; here by the score.
    """

    keep: float = option(0.5, above=0, high=1)
    first: Block = 0.25
    place: ClassVar[Place] = "end"
    restores: ClassVar[bool] = True

    def check(self, depth: int, target: bool) -> None:
        at_depths((self.first,), depth)
        if target:
            raise OptionError(
                "toc3d gives all tokens back at the tower's end; say keep=0.5 (the share that is computed), not a "
                "ratio or budget."
            )

    def active(self, index: int, depth: int) -> bool:
        return index == at_depths((self.first,), depth)[0]

    def reduce(self, block: BlockView) -> Reduction | None:
        n, prefix = block.patches, block.prefix
        keep = max(1, round_of(n, self.keep))
        if keep >= n - 1:  # the representative takes a place, too
            return None
        scores = block.cls_attention().mean(1)  # (B, n)
        kept = top(scores, keep)
        others = top(scores.scatter(1, kept, -1.0), n - keep)
        joined = representative(block.x[:, prefix:], scores, others)
        return Reduction.kept_patches(block, kept).with_rest(block, joined, others, scores)

    def rebuild(self, cut: Cut, now: Tensor) -> Tensor:
        went = cut.reduction.x[:, -1:]
        ride = cut.x + (now[:, -1:] - went)
        return cut.put_back(cut.reduction.rep[:, :-1], now[:, :-1], ride)
