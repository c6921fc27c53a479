"""ToMe: merge the most similar tokens, a few in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.budget import even_steps
from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Reduction
from tokprune.methods.options import Compat, Seed, option
from tokprune.ops.merge import Matching, bipartite_matching
from tokprune.ops.similarity import unit
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method


def _join(metric: Tensor, source: Tensor, target: Tensor) -> Matching:
    """Each source row flows into its most similar target; targets are the output, in their order.

    metric: (B, N, d). source: (B, S), target: (B, K), together all of 0 .. N-1.
    """
    rows = unit(metric)
    partner = (rows_at(rows, source) @ rows_at(rows, target).mT).argmax(-1)  # (B, S)
    place = torch.arange(target.shape[1], device=metric.device).expand_as(target)
    assign = torch.empty(metric.shape[:2], dtype=torch.long, device=metric.device)
    return Matching(target, assign.scatter(1, target, place).scatter(1, source, partner))


@torch.no_grad()
def kth_matching(metric: Tensor, k: int, prefix: int = 0) -> Matching:
    """Every k-th token is a destination, the others flow into the most similar one. metric: (B, N, d) -> K = P + (N -
    P) // k.

    The first `prefix` tokens stay out of it. Tokens behind the last whole group of k are sources like the others (the
    published code drops them: give it only the first (N // k) * k rows). k of 1 or less merges nothing.
    """
    batch, n, _ = metric.shape
    place = torch.arange(n, device=metric.device)
    if k <= 1 or n - prefix < k:
        return Matching(place.expand(batch, n), place.expand(batch, n))
    patch = place[prefix:]
    whole = (n - prefix) // k * k  # patches in whole groups
    groups = patch[:whole].unflatten(0, (-1, k))
    target, source = groups[:, -1], torch.cat([groups[:, :-1].flatten(), patch[whole:]])
    return _with_prefix(metric, source.expand(batch, -1), target.expand(batch, -1), prefix)


@torch.no_grad()
def random_matching(metric: Tensor, r: int, order: Tensor, prefix: int = 0) -> Matching:
    """`r` random tokens flow each into the most similar of the others, which stay in random order.

    metric: (B, N, d). order: (B, N - prefix) a permutation of the tokens behind the prefix, 0-based; its first r are
    the sources. r is reduced so that a destination is left; 0 or less merges nothing.
    """
    batch, n, _ = metric.shape
    r = min(r, n - prefix - 1)
    if r <= 0:
        place = torch.arange(n, device=metric.device).expand(batch, n)
        return Matching(place, place)
    return _with_prefix(metric, order[:, :r] + prefix, order[:, r:] + prefix, prefix)


def _with_prefix(metric: Tensor, source: Tensor, target: Tensor, prefix: int) -> Matching:
    joined = _join(metric[:, prefix:], source - prefix, target - prefix)
    head = torch.arange(prefix, device=metric.device).expand(metric.shape[0], prefix)
    return Matching(torch.cat([head, joined.rep + prefix], 1), torch.cat([head, joined.assign + prefix], 1))


def merge_schedule(r: int | Sequence[int], depth: int, inflection: float = 0.0, exact: bool = True) -> tuple[int, ...]:
    """Tokens to merge away in each of `depth` blocks.

    r: the mean per block, or a list (filled up with zeros, what is beyond the depth is ignored). inflection: slope from
    -1 (2 r in the first block, 0 in the last: the paper's decreasing schedule) over 0 (constant) to 1. exact: the sum
    is r times the depth; the published code truncates each step and so loses some (r = 8, -1, 12 blocks: 91 for 96).
    """
    if not isinstance(r, int):
        return tuple((list(r) + [0] * depth)[:depth])
    low = r * (1.0 - inflection)
    if not exact:
        first = int(low)
        step = (2 * r - 2 * first) / max(depth - 1, 1)
        return tuple(int(first + step * i) for i in range(depth))
    step = 2 * (r - low) / max(depth - 1, 1)
    done, out = 0, []
    for i in range(depth):
        total = r * depth if i + 1 == depth else round((i + 1) * low + step * i * (i + 1) / 2)
        out.append(total - done)
        done = total
    return tuple(out)


@register_method(
    "tome",
    paper="Token Merging: Your ViT But Faster",
    year=2023,
    url="https://arxiv.org/abs/2210.09461",
    complexity="O(LN²d)",
    memory="O(NC)",
    merges=True,
    checked=Checked(
        "facebookresearch/ToMe",
        agrees="matching, merging, schedules; logits, sizes and sources of four timm ViTs end to end",
        differs="LayerScale, query and key norms and register tokens, which its patch drops",
    ),
    presets={"mae": {"proportional": False}},
)
@dataclass(frozen=True)
class ToMe(EncoderMethod):
    """ToMe (ICLR 2023): between attention and MLP of every block, tokens at even places merge into similar ones at odd
    places.

    r: tokens merged away per block, or a list with one number per block; without it, `ratio` or `budget` says how many
    patches are left in the end, spread evenly over the blocks. Before a connector method, which follows the ratio, the
    square root of the ratio, so that both stages reduce by the same factor. A block merges at most half of its patches;
    [CLS] and other prefix tokens never merge. inflection: -1 merges most in the first blocks (table 10 of the paper), 1
    in the last ones. proportional: attention counts a merged token as often as it has members (equation 1); switch it
    off for MAE models that were not trained with it, as published (preset="mae"). matching: "bipartite", or the paper's
    rivals "random" and "kth" (every k-th patch is a destination, so a block keeps 1 / k; r is not used). k, seed: for
    those two. compat="published" truncates sloping schedules as the published code does. That code also drops
    LayerScale and query/key normalisation of the models it patches and protects two prefix tokens at most; here blocks
    stay as they are.
    """

    r: int | tuple[int, ...] | None = option(
        None, low=0, example=8, hint="It is how many tokens a block merges, or one number per block: r=(16, 8, 0)."
    )
    inflection: float = option(0.0, low=-1, high=1, hint="-1 merges early, 1 late.")
    proportional: bool = True
    matching: Literal["bipartite", "kth", "random"] = "bipartite"
    k: int = option(2, low=1)
    seed: Seed = 0
    compat: Compat = "corrected"

    @property
    def scheduled(self) -> bool:
        return self.r is not None or self.matching == "kth"

    def check(self, depth: int, target: bool) -> None:
        if self.matching == "kth" and target:
            raise OptionError(
                "matching='kth' keeps 1 / k of the patches in every block and cannot meet a ratio; leave it out."
            )
        if (self.r is None) != target and self.matching != "kth":
            given = "both r and a ratio or budget are" if target else "neither r nor a ratio or budget is"
            raise OptionError(f"{given} given; write r=8 (merged per block), or ratio=0.5 (left in the end).")

    def count(self, block: BlockView) -> int:
        """How many rows this block shall merge away."""
        if self.r is None:
            gone = 0 if block.target is None else block.start - block.target
            return even_steps(gone, block.depth)[block.index]
        schedule = merge_schedule(self.r, block.depth, self.inflection, self.compat != "published")
        return schedule[block.index]

    def active(self, index: int, depth: int) -> bool:
        if self.r is None or self.matching == "kth":
            return True
        return merge_schedule(self.r, depth, self.inflection, self.compat != "published")[index] > 0

    def match(self, block: BlockView) -> Matching:
        """Who merges into whom."""
        if self.matching == "kth":
            return kth_matching(block.metric(), self.k, block.prefix)
        if self.matching == "random":
            generator = torch.Generator().manual_seed(self.seed + block.index)
            order = torch.randperm(block.patches, generator=generator).to(block.x.device)  # the same for every image
            return random_matching(block.metric(), self.count(block), order.expand(len(block.x), -1), block.prefix)
        return bipartite_matching(block.metric(), self.count(block), block.prefix)

    def reduce(self, block: BlockView) -> Reduction | None:
        if self.matching != "kth" and self.count(block) <= 0:
            return None
        matching = self.match(block)
        return None if matching.rep.shape[1] == block.x.shape[1] else Reduction.merged(block, matching)
