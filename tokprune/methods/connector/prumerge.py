"""LLaVA-PruMerge: keep the tokens whose [CLS] attention stands out, merge their neighbours into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.ops.grid import stacks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method
from tokprune.tokens import Merge, Selection, VisualTokens


def neighbour_rows(keys: Tensor, kept: Tensor, weights: Tensor, neighbours: int) -> Tensor:
    """Merge weights of "itself once, plus its nearest others by their weights".

    keys: (B, N, C), compared by cosine. kept: (B, K) indices. weights: (B, N), what a token brings into a row when it
    is a neighbour. Neighbours are the min(neighbours, N - 1) most similar other tokens, kept ones included; ties go to
    the lower index. Returns rows (B, K, N), not normalised. O(K N C).
    """
    rows = unit(keys)
    n = rows.shape[1]
    similarity = rows_at(rows, kept) @ rows.transpose(1, 2)  # (B, K, N)
    similarity.scatter_(2, kept[..., None], -torch.inf)  # never one's own neighbour
    nearest = torch.sort(similarity, dim=-1, descending=True, stable=True).indices[..., : min(neighbours, n - 1)]
    brought = weights.to(rows)[:, None, :].expand(-1, kept.shape[1], -1).gather(2, nearest)
    return torch.zeros_like(similarity).scatter_(2, nearest, brought).scatter_(2, kept[..., None], 1.0)


def upper_outliers(values: Tensor) -> Tensor:
    """Which values lie above Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation. values: (..., N) -> (...,
    N) bool.
    """
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device), dim=-1)
    low, high = quartiles[0][..., None], quartiles[1][..., None]
    return values > high + 1.5 * (high - low)


def prumerge_count(attention: Tensor) -> Tensor:
    """How many tokens the image itself asks for: the upper outliers of its attention (section 3.2). (B, N) -> (B,)."""
    return upper_outliers(attention).sum(-1)


def best(attention: Tensor, keep: int) -> Tensor:
    """The `keep` tokens with the highest attention, best first. (B, N) -> (B, keep)."""
    return torch.sort(attention, dim=-1, descending=True, stable=True).indices[:, :keep]


def prumerge_rows(
    attention: Tensor, keys: Tensor, kept: Tensor, neighbours: int = 32, compat: Compat = "corrected"
) -> Tensor:
    """Merge weights of the kept tokens and of one more token that sums up the dropped ones (section 3.3).

    attention: (B, N). keys: (B, N, C), compared by cosine. kept: (B, K). Row i: token i plus its nearest others by
    their attention; last row: the dropped tokens by their attention. Corrected: each row adds up to one. Returns (B, K
    + 1, N).
    """
    rows = neighbour_rows(keys, kept, attention, neighbours)
    dropped = torch.ones_like(attention).scatter_(1, kept, 0.0)
    pooled = attention * dropped
    if compat == "corrected":
        pooled = torch.where(pooled.sum(-1, keepdim=True) > 0, pooled, dropped)  # nobody looks at them: plain mean
    rows = torch.cat([rows, pooled[:, None].to(rows)], dim=1)
    if compat == "corrected":
        rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows


@register_method(
    "prumerge",
    paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    year=2025,
    url="https://arxiv.org/abs/2403.15388",
    complexity="O(KNC)",
    memory="O(KN)",
    merges=True,
    adaptive=True,
    checked=Checked(
        "42Shawn/LLaVA-PruMerge",
        agrees='kept tokens, merge weights and the pooled token with compat="published"',
        differs="the count, which is the image's there; merging behind the projector; fewer than 33 tokens",
    ),
)
@dataclass(frozen=True)
class PruMerge(ConnectorMethod):
    """LLaVA-PruMerge (ICCV 2025) at an exact budget: top [CLS] attention, neighbours merged in, one token for what is
    left.

    neighbours: tokens merged into each kept one, 32 in the code (all others where there are fewer). Attention and keys
    are those of the last block taken as one head. The image's own count (outliers above Q3 + 1.5 IQR, plus the token
    for the rest; about 32 of 576) is in info["natural_count"]. The pooled token is one of the `keep`, at the position
    of the most attended dropped token; there is none when keep is 1 or nothing is dropped. Tiles and frames get equal
    budgets.

    What differs from the published code:
    - It adds neighbours by attention on top of the token itself, and sums the dropped tokens by attention, without
      normalising: norms drift with the number of tokens. Here each row adds up to one, the weighted average that the
      paper describes. compat="published" leaves the sums.
    - It merges before the projector; here the weights act on projected features (and DeepStack planes), an
      approximation wherever the projector is not linear.
    - Without outliers it returns the pooled token alone; it fails below 33 tokens; quartiles run over the whole batch.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention_1head:-1", "keys:-1")
    neighbours: int = option(32, low=1)
    compat: Compat = "corrected"

    def pick(self, attention: Tensor, keep: int) -> Tensor:
        """Which tokens are kept. attention: (B, N) -> (B, keep)."""
        return best(attention, keep)

    def natural(self, attention: Tensor) -> Tensor:
        """How many tokens the published method would feed. attention: (B, N) -> (B,)."""
        return (prumerge_count(attention) + 1).clamp(max=attention.shape[1])

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` slots and say what flows into each."""
        n = len(tokens)
        check_keep(keep, n)
        attention = check_finite(wide(tokens.signal(self.needs[0])), "the [CLS] attention values")
        keys = check_finite(wide(tokens.signal(self.needs[1])).flatten(1), "the keys of the vision tower")
        sizes = tokens.layout.group_sizes
        parts = []
        for where, count, _ in stacks(sizes, equal(keep, sizes), attention.device):
            local = attention[where]
            pooled = 1 < count < where.shape[1]
            kept = self.pick(local, count - pooled)
            rows = prumerge_rows(local, keys[where], kept, self.neighbours, self.compat)
            if pooled:
                seat = local.scatter(1, kept, -torch.inf).argmax(-1, keepdim=True)
                kept = torch.cat([kept, seat], dim=1)
            parts.append((where, where.gather(1, kept), rows[:, :count]))
        indices = torch.cat([slots.flatten() for _, slots, _ in parts]).sort().values
        weights = attention.new_zeros(keep, n)
        for where, slots, rows in parts:
            weights[torch.searchsorted(indices, slots)[:, :, None], where[:, None, :]] = rows
        natural = [self.natural(attention[where]).sum() for where, _, _ in stacks(sizes, sizes, attention.device)]
        return Selection(
            indices, Merge(rows=weights), info={"scores": attention, "natural_count": torch.stack(natural).sum()}
        )
