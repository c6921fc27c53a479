"""PruMerge+: PruMerge with tokens sampled evenly over the image beside the outstanding ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.connector.prumerge import PruMerge, prumerge_count
from tokprune.ops.topk import ranks, true_indices
from tokprune.registry import Checked, register_method


def fill_evenly(taken: Tensor, missing: Tensor) -> Tensor:
    """Choose `missing` of the tokens not taken, evenly spaced among them in raster order.

    taken: (B, N) bool. missing: (B, 1), at most the number of free tokens. Returns (B, N) bool. Integer arithmetic, so
    the count is exact.
    """
    place = (~taken).cumsum(-1)  # 1-based place among the free tokens
    free = place[:, -1:].clamp_min(1)
    half = free // 2  # samples in the middle of their stretch
    reached = (place * missing + half) // free
    before = ((place - 1) * missing + half) // free
    return ~taken & (reached > before)


def fill_strided(taken: Tensor, missing: Tensor, keep: int) -> Tensor:
    """Choose the first `missing` of every max(1, N // keep)-th token that are not taken: the known
    fixed-budget port.
    """
    n = taken.shape[-1]
    grid = (torch.arange(n, device=taken.device) % max(1, n // keep) == 0) & ~taken
    return grid & (grid.cumsum(-1) <= missing)


@register_method(
    "prumerge_plus",
    paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    year=2025,
    url="https://arxiv.org/abs/2403.15388",
    complexity="O(KNC)",
    memory="O(KN)",
    merges=True,
    adaptive=True,
    checked=Checked(
        "42Shawn/LLaVA-PruMerge",
        agrees="the count rule and merging",
        differs="an exact budget, and samples that reach over the whole picture",
    ),
)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+ (ICCV 2025) at an exact budget: outstanding tokens, spatial samples for the rest of the budget, then
    merging.

    The tokens whose attention stands out come first (as many as fit); the rest of the budget is spread evenly over the
    remaining tokens in raster order. Merging, pooled token and options are those of PruMerge. info["natural_count"] is
    what the published rule would feed (about a quarter of 576).

    What differs from the published code, beside what PruMerge lists:
    - Its count is the image's; a third-party port with a fixed budget takes every (N // keep)-th token and cuts the
      list off when full, so that the samples leave out the lower part of the image. Here they reach over all of it;
      compat="published" samples like the port.
    - It divides by zero when no token stands out, never samples the last patch, takes one image at a time, and its
      training branch may keep a token twice.
    """

    def pick(self, attention: Tensor, keep: int) -> Tensor:
        """Which tokens are kept. attention: (B, N) -> (B, keep), ascending."""
        outstanding = prumerge_count(attention).clamp(max=keep)[:, None]
        taken = ranks(attention) < outstanding
        missing = keep - outstanding
        fill = fill_strided(taken, missing, keep) if self.compat == "published" else fill_evenly(taken, missing)
        return true_indices(taken | fill, keep)

    def natural(self, attention: Tensor) -> Tensor:
        """How many tokens the published method would feed. attention: (B, N) -> (B,)."""
        n = attention.shape[1]
        outstanding = prumerge_count(attention)[:, None]
        step = (n // outstanding.clamp_min(1) // 3).clamp_min(1)
        place = torch.arange(n, device=attention.device)
        kept = (ranks(attention) < outstanding) | ((place % step == 0) & (place < n - 1))
        return (kept.sum(-1) + 1).clamp(max=n)
