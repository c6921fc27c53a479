"""HoloV: share the budget out over crops of the image, so that context survives beside the highlights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal, share_out
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.ops.grid import stacks
from tokprune.ops.numeric import wide
from tokprune.ops.topk import rank_in_group, ranks, top_by_tier, top_in_groups
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def _crops(n: int, crops: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`crops` runs in raster order, the first n % crops one token longer: crop of each token (N,), sizes (P,)."""
    sizes = torch.full((crops,), n // crops, device=device) + (torch.arange(crops, device=device) < n % crops)
    return torch.arange(crops, device=device).repeat_interleave(sizes, output_size=n), sizes


def _diversity(features: Tensor, crops: int) -> Tensor:
    """Variance of each token's cosine similarities within its crop, its own counted as 0. (B, N, D) -> (B, N)."""
    longer = (
        features.shape[1] % crops
    )  # crops that are one token longer than the others: two kinds, each without padding
    split = longer * (features.shape[1] // crops + 1)
    parts = [(features[:, :split], longer), (features[:, split:], crops - longer)]
    return torch.cat([_spread(x.unflatten(1, (p, -1))).flatten(1) for x, p in parts if p], dim=1)


def _spread(rows: Tensor) -> Tensor:
    """`_diversity` of crops of equal length. (B, P, m, D) -> (B, P, m)."""
    product = rows @ rows.transpose(-1, -2)  # (B, P, m, m); lengths are on its diagonal: the features are read once
    scale = 1 / (product.diagonal(dim1=-2, dim2=-1).sqrt() + 1e-6)
    similarity = product * scale[..., :, None] * scale[..., None, :]
    similarity.diagonal(dim1=-2, dim2=-1).fill_(0.0)
    others = max(rows.shape[2] - 1, 1)
    return (similarity - similarity.sum(-1, keepdim=True) / others).square().sum(-1) / others


def _crop_mean(values: Tensor, crop: Tensor, sizes: Tensor) -> Tensor:
    """(B, N) -> (B, P)."""
    return values.new_zeros(values.shape[0], sizes.shape[0]).index_add_(1, crop, values) / sizes


def holov(
    features: Tensor, attention: Tensor, keep: int, crops: int = 16, gamma: float = 0.09, tau: float = 1.0
) -> Tensor:
    """Crop-wise budgets by attention and diversity together, and the same score inside a crop: as the paper has it.

    features: (B, N, D). attention: (B, N). Score H = A + gamma * V, where V, the variance of similarities within the
    crop, is brought to the scale of A over the whole image. A crop's share is its mean H to the power tau; what a full
    crop cannot take goes to the others. Returns (B, keep), ascending.
    """
    n = attention.shape[1]
    crops = min(crops, n)
    crop, sizes = _crops(n, crops, attention.device)
    variance = _diversity(wide(features), crops)
    tiny = torch.finfo(variance.dtype).tiny
    scale = attention.abs().mean(-1, keepdim=True) / variance.mean(-1, keepdim=True).clamp_min(tiny)
    score = attention + gamma * variance * scale
    quota = share_out(keep, _crop_mean(score, crop, sizes).clamp_min(0) ** tau, sizes)
    return top_in_groups(score, crop, quota, keep)


def holov_published(features: Tensor, attention: Tensor, keep: int, crops: int = 16) -> tuple[Tensor, Tensor]:
    """What the published code keeps: positions (B, keep) in its output order, -1 for each zero vector, and quotas (B,
    P).

    Attention times 1000 plus 0.09 * variance, the latter rescaled within each crop; quotas are rounded down and the
    rest goes one by one to the heaviest crops; inside a crop raw attention decides, best first. What a crop cannot fill
    is lost.
    """
    n = attention.shape[1]
    crop, sizes = _crops(n, crops, attention.device)
    variance = _diversity(wide(features), crops)
    attention = attention * 1e3
    scale = _crop_mean(attention.abs(), crop, sizes) / (_crop_mean(variance.abs(), crop, sizes) + 1e-6)
    weight = _crop_mean(attention + 0.09 * variance * scale[:, crop], crop, sizes)
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-6)
    quota = (weight * keep).floor().long()
    quota = quota + (ranks(weight) < keep - quota.sum(-1, keepdim=True)).long()
    rank = rank_in_group(attention, crop)
    raster = torch.arange(n, device=crop.device) - (sizes.cumsum(0) - sizes)[crop]
    used = torch.minimum(quota, sizes)
    within = torch.where((quota >= sizes)[:, crop], raster, rank)  # a crop that stays whole stays in raster order
    slot = (used.cumsum(-1) - used)[:, crop] + within
    slot = torch.where(rank < quota[:, crop], slot, keep).clamp(max=keep)  # the last slot is the bin
    out = torch.full((attention.shape[0], keep + 1), -1, device=crop.device)
    return out.scatter_(1, slot, torch.arange(n, device=crop.device).expand_as(slot))[:, :keep], quota


@register_method(
    "holov",
    paper="Don't Just Chase “Highlighted Tokens” in MLLMs: Revisiting Visual Holistic Context Retention",
    year=2025,
    url="https://arxiv.org/abs/2510.02912",
    complexity="O(N²D / P)",
    memory="O(N²/P)",
    checked=Checked(
        "obananas/HoloV",
        agrees='allocation and picks with compat="published", even and uneven crops',
        differs="slots that it fills with zero vectors go to the best tokens left",
    ),
)
@dataclass(frozen=True)
class HoloV(ConnectorMethod):
    """HoloV (NeurIPS 2025): budgets per crop from attention and from the diversity of what the crop shows.

    crops: runs of the raster order, 16 in the LLaVA code (fewer when there are fewer tokens). gamma: weight of
    diversity, 0.09 as in the code. tau: sharpness of the allocation; 1 is proportional, as in the code. Tiles and
    frames get equal budgets.

    What differs from the published code, where the paper has it as here:
    - It rescales diversity within each crop, so that its mean is the same share of attention everywhere: it cancels,
      and attention alone decides the allocation. Here diversity is brought to attention's scale once per image.
    - It picks by raw attention inside a crop; here by attention plus diversity.
    - A crop that gets more than it has tokens wastes the rest: zero vectors are fed to the LLM (16 of 32 in one test),
      or position -1 in the Qwen version. Here the surplus goes to other crops. compat="published" allocates and picks
      as the code does; the slots that it fills with zeros go to the best tokens left, since a budget is kept exactly in
      every mode (`holov_published` shows the empty ones).
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    crops: int = option(16, low=1)
    gamma: float = option(0.09, low=0)
    tau: float = option(1.0, low=0)
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens of the stream."""
        check_keep(keep, len(tokens))
        attention = check_finite(wide(tokens.signal("cls_attention")), "the [CLS] attention values")
        features = check_finite(tokens.features.detach(), "the visual features")
        sizes = tokens.layout.group_sizes
        chosen = []
        for where, count, _ in stacks(sizes, equal(keep, sizes), attention.device):
            if self.compat == "published":
                crops = min(self.crops, where.shape[1])
                order, _ = holov_published(features[where], attention[where], count, crops)
                taken = torch.zeros(where.shape[0], where.shape[1] + 1, dtype=torch.long, device=where.device)
                taken = taken.scatter_(1, torch.where(order < 0, where.shape[1], order), 1)[:, :-1]
                local = top_by_tier(taken, attention[where], count)
            else:
                local = holov(features[where], attention[where], count, self.crops, self.gamma, self.tau)
            chosen.append(where.gather(1, local).flatten())
        return Selection(torch.cat(chosen).sort().values, info={"scores": attention})
