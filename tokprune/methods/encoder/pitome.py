"""PiToMe: merge only tokens that have much company, and leave lone ones alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.budget import geometric_counts
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Reduction
from tokprune.methods.options import option
from tokprune.ops.blocks import row_blocks
from tokprune.ops.merge import Matching
from tokprune.ops.similarity import gram, most_similar, unit
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method


def energy(metric: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """Mean over all tokens of the cosine above `margin`, softened below it by an ELU. metric: (B, n, d) -> (B, n).

    High: one of many alike (background). Low: alone (an object). A token counts itself.
    """
    rows, parts = unit(metric), list(row_blocks(metric.shape[-2]))
    blocks = ((gram(rows) if len(parts) == 1 else rows[..., part, :] @ rows.mT) for part in parts)
    return torch.cat([torch.nn.functional.elu(block - margin, alpha=alpha).mean(-1) for block in blocks], -1)


@torch.no_grad()
def energy_matching(
    metric: Tensor, r: int, margin: float, prefix: int = 0, bipartite: bool = False, alpha: float = 1.0
) -> Matching:
    """Merge `r` tokens into alike ones, choosing by energy who may merge.

    metric: (B, N, d). r: at most half of the patches. margin, alpha: of the energy. The patches are ranked by energy,
    highest first. Default: the first 2 r merge, each of those at even ranks into the most similar one at an odd rank;
    the others are protected. bipartite: all even ranks look for a partner among all odd ranks and the r most similar
    pairs merge. Output rows: the prefix, the protected ones (default: by energy; bipartite: the even ranks that stay,
    most similar first), the odd ranks. Equal values: lower index first.
    """
    batch, n, _ = metric.shape
    device = metric.device
    r = min(r, (n - prefix) // 2)
    if r <= 0:
        same = torch.arange(n, device=device).expand(batch, n)
        return Matching(same, same)
    rows = unit(metric[:, prefix:])
    ranked = torch.sort(energy(metric[:, prefix:], margin, alpha), dim=-1, descending=True, stable=True).indices
    even, odd = (
        (ranked[:, 0::2], ranked[:, 1::2]) if bipartite else (ranked[:, 0 : 2 * r : 2], ranked[:, 1 : 2 * r : 2])
    )

    value, partner = most_similar(rows_at(rows, even), rows_at(rows, odd))
    target = odd.gather(1, partner)
    if bipartite:
        best_first = torch.sort(value, dim=-1, descending=True, stable=True).indices
        alone = even.gather(1, best_first[:, r:])
        source, target = even.gather(1, best_first[:, :r]), target.gather(1, best_first[:, :r])
    else:
        alone, source = ranked[:, 2 * r :], even
    head = torch.arange(prefix, device=device).expand(batch, -1)
    rep = torch.cat([head, alone + prefix, odd + prefix], 1)
    row = torch.arange(rep.shape[1], device=device).expand_as(rep)
    assign = torch.empty(batch, n, dtype=torch.long, device=device).scatter(1, rep, row)
    return Matching(rep, assign.scatter(1, source + prefix, assign.gather(1, target + prefix)))


@register_method(
    "pitome",
    paper="Accelerating Transformers with Spectrum-Preserving Token Merging",
    year=2024,
    url="https://arxiv.org/abs/2405.16148",
    complexity="O(LN²d)",
    memory="O(NC)",
    merges=True,
    checked=Checked(
        "hchautran/PiToMe",
        agrees="energies, merged tokens and sizes of both variants",
    ),
    presets={"clip": {"margin": 0.9}},
)
@dataclass(frozen=True)
class PiToMe(EncoderMethod):
    """PiToMe (NeurIPS 2024): every block keeps the same share; tokens with the highest energy (most neighbours alike)
    merge.

    keep: share of patches that each block leaves (at least 0.5); `ratio` or `budget` sets it from what is left in the
    end. margin: similarity above which a neighbour counts, in the first block; it falls linearly to 0 in the last. 0.75
    for DeiT and MAE, 0.9 for CLIP (preset="clip"), as published. alpha: how much less similar neighbours lower the
    energy, the slope of the ELU below the margin, 1 as published. variant: "energy" merges among the 2 r of highest
    energy; "bipartite" ranks by energy and then matches halves as ToMe does; "auto": bipartite in the first half of the
    blocks, energy in the second, as published for DeiT. proportional: attention weighted by size; the published code
    passes sizes on but never uses them there, so it is off.
    """

    keep: float = option(0.9125, low=0.5, high=1, hint="A block can merge at most half of its patches.")
    margin: float = 0.75
    alpha: float = option(1.0, low=0)
    variant: Literal["auto", "energy", "bipartite"] = "auto"
    proportional: bool = False

    def left(self, block: BlockView) -> int:
        """Patches that this block leaves."""
        if block.target is None:
            return block.patches - int(block.patches - block.patches * self.keep)
        return geometric_counts(block.start, block.target, block.depth)[block.index]

    def reduce(self, block: BlockView) -> Reduction | None:
        r = block.patches - self.left(block)
        if r <= 0:
            return None
        halves = self.variant == "bipartite" or (self.variant == "auto" and block.index < -(-block.depth // 2))
        margin = self.margin * (1 - block.index / block.depth)
        matching = energy_matching(block.metric(), r, margin, block.prefix, halves, self.alpha)
        return None if matching.rep.shape[1] == block.x.shape[1] else Reduction.merged(block, matching)
