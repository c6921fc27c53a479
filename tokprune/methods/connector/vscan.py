"""VScan, stage 1: a local scan of a shallow layer, a global scan of a deep one, and the rest merged in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import equal
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Block, Compat, option
from tokprune.ops.grid import stacks
from tokprune.ops.merge import join_nearest
from tokprune.ops.numeric import wide
from tokprune.ops.topk import rank_in_group, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.tokens import Merge, Selection, VisualTokens


def window_of(row: Tensor, col: Tensor, grid: tuple[int, int], windows: int) -> Tensor:
    """Number of the window that holds each token, when the grid is cut into windows x windows of about equal size."""
    down = row * windows // grid[0]
    across = col * windows // grid[1]
    return down * windows + across


def vscan_local(shallow: Tensor, window: Tensor, local: int) -> Tensor:
    """The `local` tokens of the local scan, each window's best first, an incomplete round to the highest scores.

    shallow: (B, N) attention. window: (N,) or (B, N). Returns (B, N) bool.
    """
    rank = rank_in_group(shallow, window)
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(1, top_by_tier(-rank, shallow, local), True)


def vscan_merge(features: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Each dropped token joins its most similar kept one, which becomes the mean of itself and all that joined.

    features: (B, N, D) projected. kept: (B, K), ascending. Returns the place in `kept` and the weight of each token,
    (B, N).
    """
    place, count = join_nearest(features, kept)
    return place, 1.0 / count.gather(1, place)


@register_method(
    "vscan",
    paper="VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
    year=2026,
    url="https://arxiv.org/abs/2505.22654",
    complexity="O(NKD)",
    memory="O(ND)",
    merges=True,
    checked=Checked(
        "Tencent/SelfEvolvingAgent",
        agrees="kept and averaged tokens of stage 1, pictures and tiles",
        differs="what it loses by rounding down goes to other windows; the stage in the LLM",
    ),
)
@dataclass(frozen=True)
class VScan(ConnectorMethod):
    """VScan, stage 1 (TMLR 2026): local tokens of a shallow layer, global tokens of a deep one, dropped ones averaged
    in.

    windows: the grid is cut into windows x windows, 4 as published (6 x 6 tokens of 24 x 24). shallow: block of the
    local scan; 0.217 is block 5 of CLIP-L's 24. The global scan reads the layer that the model selects (block 22). Half
    of the budget goes to each. The paper's scripts keep 96 of 576 here and prune on to 32 in layer 16 of the LLM, which
    is its stage 2: put a `decoder` method after this one. Tiles and frames get equal budgets. Merging acts on projected
    features, as published.

    What differs from the published code: it gives every window (keep // 2) // 16 tokens and loses the remainder (45 of
    58); here the remainder goes round by round to the windows' best. With compat="published" the windows' shares are
    rounded down, and what is lost goes to the global scan, since a budget is kept exactly. It knows 24 x 24 only.
    """

    windows: int = option(4, low=1)
    shallow: Block = 0.217
    compat: Compat = "corrected"

    @property
    def needs(self) -> tuple[str, ...]:
        return (f"cls_attention:{self.shallow}", "cls_attention")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` tokens, each the mean of those that joined it."""
        check_keep(keep, len(tokens))
        shallow, deep = (check_finite(wide(tokens.signal(s)), "the [CLS] attention values") for s in self.needs)
        features = check_finite(tokens.features.detach(), "the visual features")
        layout = tokens.layout
        sizes = layout.group_sizes
        into = torch.full((len(tokens),), -1, device=deep.device)  # a tile without a budget flows nowhere
        weight = torch.zeros(len(tokens), dtype=torch.float32, device=deep.device)
        chosen = []
        for where, count, grid in stacks(sizes, equal(keep, sizes), deep.device, layout.grids):
            window = window_of(layout.row, layout.col, grid, self.windows).to(deep.device)[where]
            if self.compat == "published":
                local = rank_in_group(shallow[where], window) < count // 2 // self.windows**2
            else:
                local = vscan_local(shallow[where], window, count // 2)
            kept = top_by_tier(local.long(), deep[where], count)
            place, part = vscan_merge(features[where], kept)
            weight[where] = part.to(weight)
            kept = where.gather(1, kept)
            into[where] = kept.gather(1, place)
            chosen.append(kept.flatten())
        indices = torch.cat(chosen).sort().values
        row = torch.where(into >= 0, torch.searchsorted(indices, into), -1)
        return Selection(indices, Merge(target=row, scale=weight), info={"scores": deep, "shallow_scores": shallow})
