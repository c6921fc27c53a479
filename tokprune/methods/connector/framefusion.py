"""FrameFusion: tokens that look like the one before at the same place merge into it, then the least attended go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.methods.attended import attended
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.options import option
from tokprune.ops.frames import similarity_to
from tokprune.ops.topk import ranks, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.tokens import Merge, Selection, VisualTokens

TEXT = -1  # patch type of tokens that are no part of the video
FIRST = -2.0  # similarity of a token with nothing before it


def framefusion_order(patch: Tensor) -> Tensor:
    """Positions patch type by patch type, each in order; text (-1) comes first. patch: (L,) -> (L,)."""
    return torch.sort(patch, stable=True).indices


def framefusion_similarity(hidden: Tensor, patch: Tensor) -> Tensor:
    """Cosine with the previous token of the same patch type; -2 for the first of its type and for text.

    hidden: (L, C). patch: (L,) type of each token, -1 for text. Returns (L,), in the order of the sequence.
    """
    order = framefusion_order(patch)
    sorted_patch = patch[order]
    follows = torch.cat([torch.zeros_like(patch[:1]), (sorted_patch[1:] == sorted_patch[:-1]).long()]).bool()
    before = torch.where(follows & (sorted_patch != TEXT), torch.cat([order[:1], order[:-1]]), -1)
    return similarity_to(hidden, torch.empty_like(order).scatter(0, order, before), FIRST)


def framefusion_heads(patch: Tensor, merges: Tensor) -> Tensor:
    """The token into which each one flows: itself, or for those that merge the last one of its type that does not.

    patch: (L,). merges: (L,) bool, false for the first of each type. Returns (L,) positions.
    """
    order = framefusion_order(patch)
    place = torch.arange(len(order), device=order.device)
    head = torch.where(merges[order], 0, place).cummax(0).values
    return torch.empty_like(order).scatter(0, order, order[head])


@register_method(
    "framefusion",
    paper="FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Visual Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2501.01986",
    complexity="O(ND)",
    memory="O(ND)",
    merges=True,
    presets={"internvl": {"threshold": 0.5}},
    checked=Checked(
        "thu-nics/FrameFusion",
        "one call of its procedure, its similarities and its budget of FLOPs on the golden vectors",
        "all of it happens in front of the LLM here, once, for an exact count",
    ),
)
@dataclass(frozen=True)
class FrameFusion(ConnectorMethod):
    """FrameFusion (ICCV 2025) before the first layer: what repeats the frame before merges, then the least attended
    goes.

    Each token is compared with the previous one at the same place; those of at least `threshold` (0.6), the most
    similar first and no more than have to go, merge into it, and runs of them into one mean at the run's first token.
    If more tokens are left than asked, the most attended stay.

    The publication spreads this over the first layers of the LLM, with a budget of FLOPs, and prunes by the LLM's
    attention. Here all of it happens in front of the LLM, where a count is asked for: merging happens once, and
    importance is the tower's attention, averaged over what was merged. That also avoids what ails the published code:
    28 layers assumed for every model; sums in half precision; the mean over all queries of a causal map, which favours
    early tokens; and one video at a time. Videos of two or three frames, of which at most a half or two thirds can
    merge, are pruned more.

    A picture or tile has nothing before it: the most attended tokens.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    threshold: float = option(0.6, low=-1, high=1)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Merge and choose `keep` tokens of the stream."""
        features, attention, layout = attended(tokens, keep)
        n = len(tokens)
        patch = layout.row * max(w for _, w in layout.grids) + layout.col
        if layout.kind != "video":
            patch = torch.arange(n, device=patch.device)  # nothing comes before anything
        similarity = framefusion_similarity(features, patch)
        merges = (similarity >= self.threshold) & (ranks(similarity) < n - keep)
        heads = framefusion_heads(patch, merges)
        size = torch.zeros_like(attention).index_add(0, heads, torch.ones_like(attention))
        worth = torch.zeros_like(attention).index_add(0, heads, attention) / size.clamp(min=1)
        indices = top_by_tier((heads == torch.arange(n, device=heads.device)).long(), worth, keep)
        slot = torch.full((n,), -1, device=heads.device).scatter(0, indices, torch.arange(keep, device=heads.device))
        return Selection(indices, Merge(target=slot[heads], scale=1 / size[heads]), info={"scores": worth})
