"""HiRED: an early block says how much each tile may keep, a late block says what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import equal, floor_of, share_out
from tokprune.errors import OptionError
from tokprune.methods.base import ScoreMethod, check_finite, check_keep
from tokprune.methods.options import Block, Compat, option
from tokprune.ops.grid import check_canvas, region_sums
from tokprune.ops.numeric import wide
from tokprune.ops.topk import top, top_in_groups
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, Selection, VisualTokens


def hired_budgets(early: Tensor, layout: Layout, keep: int, alpha: float = 0.5) -> Tensor:
    """Tokens for the thumbnail and for each tile: exactly `keep` in sum (algorithm 1 of the paper).

    The thumbnail gets the share alpha. The tiles share the rest by the attention mass that the early block's [CLS] pays
    to the region of the thumbnail that each tile shows, rounded by largest remainders; what a full tile cannot take
    flows to the others, and what all of them cannot take goes back to the thumbnail.

    early: (N,) one value per token of the stream, read for the thumbnail only. Returns (1 + tiles,) counts.
    """
    return thumbnail_and_tiles(region_sums(early, layout)[None], layout.group_sizes, keep, alpha)[0]


def thumbnail_and_tiles(mass: Tensor, sizes: Sequence[int], keep: int, alpha: float) -> Tensor:
    """The same from the tiles' masses. mass: (B, tiles). sizes: tokens of thumbnail and tiles. -> (B, 1 + tiles)."""
    thumbnail = max(min(floor_of(keep, alpha), sizes[0]), keep - sum(sizes[1:]))
    tiles = share_out(keep - thumbnail, mass, torch.tensor(sizes[1:], device=mass.device))
    return torch.cat([tiles.new_full((len(tiles), 1), thumbnail), tiles], 1)


def hired_published_budgets(early: Tensor, tiles: int, keep: int, alpha: float = 0.5) -> Tensor:
    """The counts of the published code, which differ from the paper.

    It counts how many of the N (1 - alpha) best early tokens fall into each of `tiles` contiguous runs of the raster
    (horizontal bands, whatever the canvas), cuts the shares to whole numbers and clamps them without handing the rest
    out again, so that the sum may stay below `keep`. alpha = 1 leaves nothing to count and is refused.

    early: (N,) [CLS] row of the thumbnail, heads summed or averaged. Returns (1 + tiles,) counts.
    """
    n = early.shape[0]
    if n % tiles:
        raise OptionError(
            f"compat='published' cuts the thumbnail's {n} tokens into {tiles} equal runs, which does not divide; "
            "use compat='corrected'."
        )
    thumbnail = min(int(keep * alpha), n)
    rest = min(keep - thumbnail, tiles * n)
    counts = torch.zeros(tiles, dtype=torch.long, device=early.device)
    if rest > 0:
        best = torch.sort(wide(early), descending=True, stable=True).indices[: int(n * (1 - alpha))]
        if len(best) == 0:
            raise OptionError(f"compat='published' divides by zero at alpha={alpha}; use compat='corrected'.")
        hits = torch.bincount(torch.div(best * tiles, n, rounding_mode="floor"), minlength=tiles)
        counts = (hits.float() / hits.sum().float() * rest).long().clamp(max=n)
    return torch.cat([counts.new_tensor([thumbnail]), counts])


@register_method(
    "hired",
    paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models",
    year=2025,
    url="https://arxiv.org/abs/2408.10945",
    complexity="O(N log N)",
    memory="O(N)",
    checked=Checked(
        "hasanar1f/HiRED",
        agrees='masks and budgets with compat="published", tiled and single pictures',
        differs="bands for regions, hits for attention mass, lost truncation (compat); padding chosen and dropped; "
        "packing of swapped canvases",
    ),
)
@dataclass(frozen=True)
class HiRED(ScoreMethod):
    """HiRED (AAAI 2025): budgets over tiles from block `init_layer`'s [CLS] row of the thumbnail, picks by the late
    row.

    alpha: the thumbnail's share, 0.5 in the paper (section 4.3) and in the authors' scripts; their code's own default
    is 1.0, the thumbnail alone. init_layer: block of the vision tower (0, the first). Without tiles it is the top of
    the late row. Frames of a video, and tiles without a thumbnail, have no map that says how much each is worth: they
    share equally.

    compat="published" keeps the counts of the published code: bands instead of regions, hits instead of attention mass,
    truncation without handing the rest out, so that fewer than the budget may stay. (It also chose padding and dropped
    it afterwards, and swapped height and width when unpadding; padding never reaches a method here.)
    """

    alpha: float = option(0.5, low=0, high=1)
    init_layer: Block = 0
    compat: Compat = "corrected"

    @property
    def needs(self) -> tuple[str, ...]:
        """The [CLS] rows of the selected layer and of the early block."""
        return ("cls_attention", f"cls_attention:{self.init_layer}")

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """On an accelerator, streams that are cut alike in one go; it is launches that cost time there."""
        alike: dict[object, list[int]] = {}
        for i, (tokens, keep) in enumerate(zip(batch, keeps, strict=True)):
            check_keep(keep, len(tokens))
            layout, device = tokens.layout, tokens.signal("cls_attention").device
            holes = layout.group_sizes[0] < math.prod(layout.grids[0])
            apart = device.type == "cpu" or self.compat != "corrected" or holes
            key = i if apart else (keep, layout.group_sizes, layout.grids[0], layout.thumbnail, layout.canvas, device)
            alike.setdefault(key, []).append(i)
        out: dict[int, Selection] = {}
        for members in alike.values():
            some, keep = [batch[i] for i in members], keeps[members[0]]
            if len(members) == 1:
                out[members[0]] = super().select(some[0], keep)
                continue
            scores = check_finite(
                torch.stack([self.scores(tokens) for tokens in some]), f"the scores of {self.info.name}"
            )
            chosen = self._choose_alike(some, scores, keep)
            out.update((i, Selection(c, info={"scores": s})) for i, c, s in zip(members, chosen, scores, strict=True))
        return [out[i] for i in range(len(batch))]

    def _choose_alike(self, batch: Sequence[VisualTokens], scores: Tensor, keep: int) -> Tensor:
        """`choose` for B streams of equal groups. scores: (B, N) -> (B, keep)."""
        layout = batch[0].layout
        if layout.num_groups == 1:
            return top(scores, keep)
        group = torch.stack([tokens.layout.group.to(scores.device) for tokens in batch])  # (B, N)
        if layout.thumbnail:
            early = torch.stack([wide(tokens.signal(f"cls_attention:{self.init_layer}")) for tokens in batch])
            check_finite(early, "the early attention")
            budgets = thumbnail_and_tiles(region_sums(early, layout), layout.group_sizes, keep, self.alpha)
        else:
            budgets = torch.tensor(equal(keep, layout.group_sizes), device=scores.device).expand(len(batch), -1)
        return top_in_groups(scores, group, budgets.to(scores.device), keep)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Late [CLS] attention of each token. Returns (N,)."""
        return wide(tokens.signal("cls_attention"))

    def choose(self, tokens: VisualTokens, scores: Tensor, keep: int) -> Tensor:
        """The best of each tile by late attention, as many as the early attention grants it."""
        if tokens.layout.num_groups == 1:
            return top(scores, keep)
        budgets = self.shares(tokens, keep)
        total = keep if self.compat == "corrected" else int(budgets.sum())
        return top_in_groups(scores, tokens.layout.group.to(scores.device), budgets.to(scores.device), total)

    def shares(self, tokens: VisualTokens, keep: int) -> Tensor:
        """Tokens that each of several tiles or frames may keep. Returns (groups,) counts."""
        layout = tokens.layout
        if not layout.thumbnail:
            return torch.tensor(equal(keep, layout.group_sizes), device=tokens.features.device)
        early = check_finite(wide(tokens.signal(f"cls_attention:{self.init_layer}")), "the early attention")
        if self.compat == "corrected":
            return hired_budgets(early, layout.to(early.device), keep, self.alpha)
        canvas = check_canvas(layout)
        sizes = torch.tensor(layout.group_sizes, device=early.device)
        own = early[: layout.group_sizes[0]]
        return hired_published_budgets(own, canvas[0] * canvas[1], keep, self.alpha).minimum(sizes)
