"""ATS: sample patches by the inverse of the cumulated attention of [CLS]; each image keeps as many as it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Reduction, at_depths
from tokprune.methods.options import Block, Compat, option
from tokprune.ops.blocks import row_blocks
from tokprune.registry import Checked, register_method


def significance(cls_attention: Tensor, value_norm: Tensor) -> Tensor:
    """Worth of each patch: attention from [CLS] summed over heads times the length of its value (equation 3), summing
    to 1.

    cls_attention: (B, H, n), value_norm: (B, n) -> (B, n).
    """
    scores = cls_attention.sum(1) * value_norm
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def inverse_transform_sample(scores: Tensor, samples: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Patches hit by `samples` - 1 even steps through the cumulated scores (section 3.2).

    The scores are sorted ascending and cumulated, the curve scaled to run from 0 (first) to 1 (last); the steps run
    from its smallest value above 0 to 1, and each takes the nearest patch, the first of equals. Distinct patches count
    once. The patch with the lowest score is never hit. scores: (B, n), higher is better. real: (B, n) False for
    padding. Returns hit patches in ascending order of score, padded to the largest count: (B, K), and which of them are
    real: (B, K). One host synchronisation, for K.
    """
    n = scores.shape[1]
    if real is not None:
        scores = scores.masked_fill(~real, -1.0)
    ascending, order = torch.sort(scores, dim=-1, stable=True)
    padded = ascending < 0  # in front
    first = padded.sum(-1, keepdim=True).clamp(max=n - 1)
    total = ascending.clamp_min(0).cumsum(-1)
    base = total.gather(-1, first)
    curve = ((total - base) / (total[:, -1:] - base).clamp_min(torch.finfo(scores.dtype).tiny)).masked_fill(
        padded, -9.0
    )
    low = torch.where(curve > 0, curve, 2.0).amin(-1, keepdim=True).clamp(max=1.0)
    step = torch.arange(max(samples - 1, 1), device=scores.device, dtype=scores.dtype) / max(samples - 2, 1)
    heights = low + step * (1 - low)  # (B, samples - 1)
    parts = row_blocks(heights.shape[1], n)
    picks = torch.cat([(heights[:, part, None] - curve[:, None]).abs().argmin(-1) for part in parts], 1)
    hit = torch.zeros_like(scores, dtype=torch.bool).scatter(1, picks, True)
    width = int(hit.sum(-1).max())
    place = torch.sort(hit.to(torch.int8), dim=-1, descending=True, stable=True).indices[:, :width]
    return order.gather(1, place), hit.gather(1, place)


@register_method(
    "ats",
    paper="Adaptive Token Sampling For Efficient Vision Transformers",
    year=2022,
    url="https://arxiv.org/abs/2111.15667",
    complexity="O(NK)",
    memory="O(NC)",
    adaptive=True,
    checked=Checked(
        "adaptivetokensampling/ATS",
        agrees='the sampler and chains of two blocks with compat="published"',
        differs="padding rows do not count; budgets other than the token count, at which its code fails",
    ),
)
@dataclass(frozen=True)
class ATS(EncoderMethod):
    """ATS (ECCV 2022): from the fourth block on, [CLS] attention times value length is sampled; busy images keep more.

    first: the block from which on all blocks sample, 0-based or a fraction of the depth; 3 of 12 as published. samples:
    tokens that may stay, [CLS] included; None: as many as enter the tower. A `ratio` or `budget` sets it: images keep
    at most that many, and where that is all of them, nothing is sampled. Each such block drops at least one patch. A
    batch is padded to its richest image. A tower without [CLS] ranks by received attention. The published code counts
    padding rows as the lowest scores, so an image's result depends on its batch (compat="published"); here padding does
    not count.
    """

    first: Block = 0.25
    samples: int | None = option(None, low=2, hint="[CLS] and one patch are the least.")
    compat: Compat = "corrected"

    def check(self, depth: int, target: bool) -> None:
        at_depths((self.first,), depth)
        if target and self.samples is not None:
            raise OptionError("samples and a ratio or budget both say how many tokens may stay; give one.")

    def active(self, index: int, depth: int) -> bool:
        return index >= at_depths((self.first,), depth)[0]

    def reduce(self, block: BlockView) -> Reduction | None:
        if block.patches < 2 or (block.target is not None and block.target >= block.start):
            return None
        samples = self.samples or block.start + 1
        if block.target is not None:
            samples = block.target + 1
        scores = significance(block.cls_attention(), block.value_norm())
        real = None if self.compat == "published" else block.sizes()[:, block.prefix :, 0] > 0
        return Reduction.kept_patches(block, *inverse_transform_sample(scores, samples, real))
