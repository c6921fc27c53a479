"""TopV: tokens whose input is transported to the layer's outputs stay, and a few of the others at even distances."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import round_of
from tokprune.methods.base import check_finite
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens, at_layers
from tokprune.methods.options import option
from tokprune.ops.blocks import row_blocks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import distances
from tokprune.ops.topk import top, true_indices
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection

CostRows = Callable[[slice], Tensor]
"""Some rows of a (V, V) matrix of costs: numbers of sources -> (m, V)."""


def transport_cost(
    source: Tensor, target: Tensor, places: Tensor, picture: Tensor, weights: tuple[float, float, float], sigma: float
) -> CostRows:
    """Cost of moving each source to each target: of features, of places, and of the way to the picture's middle.

    source, target: (V, D). places: (V, 2) row and column, in cells. picture: (V,) numbers from 0 on; tokens of two
    pictures are as far apart as can be. Each of the three terms is stretched to 0 ... 1 before it is weighed (0 where
    it is the same everywhere). Rows of many tokens are made when they are asked for.
    """
    count = int(picture[-1]) + 1
    high = places.new_zeros(count, 2).scatter_reduce(0, picture[:, None].expand(-1, 2), places, "amax")
    low = places.new_full((count, 2), torch.inf).scatter_reduce(0, picture[:, None].expand(-1, 2), places, "amin")
    middle = ((high + low) / 2)[picture]
    away = (places - middle).norm(dim=-1, keepdim=True)  # (V, 1)

    def terms(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        features = distances(source[part], target).square()
        near = torch.exp(-torch.cdist(places[part], places).square() / (2 * sigma**2))
        return features, 1 - near * (picture[part, None] == picture), away[part].expand_as(features)

    parts = list(row_blocks(len(source)))
    held = terms(parts[0]) if len(parts) == 1 else None
    ends = torch.stack([torch.stack([torch.stack(t.aminmax()) for t in held or terms(part)]) for part in parts])
    least, most = ends[..., 0].amin(0), ends[..., 1].amax(0)  # (3,)
    span = torch.where(most > least, most - least, 1.0)

    def rows(part: slice) -> Tensor:
        found = terms(part) if held is None else [t[part] for t in held]
        a, b, c = (
            weight * ((t - least[i]) / span[i]) for i, (weight, t) in enumerate(zip(weights, found, strict=True))
        )
        return a + b + c

    return rows


def transported(cost: CostRows, n: int, epsilon: float, rounds: int) -> Tensor:
    """Mass that leaves each of n sources in a transport plan after a few Sinkhorn rounds. -> (n,).

    Uniform marginals. A round scales the rows, then the columns: were the rows last, every source would send exactly
    its share, and there would be nothing to rank.
    """
    parts = list(row_blocks(n))
    held = [torch.exp(-cost(part) / epsilon) for part in parts] if len(parts) == 1 else None

    def plan() -> Iterable[Tensor]:
        return held or (torch.exp(-cost(part) / epsilon) for part in parts)

    columns = torch.full_like(cost(slice(0, 1))[0], 1 / n)
    rows = torch.ones_like(columns)
    for _ in range(rounds):
        rows = 1 / (n * torch.cat([block @ columns for block in plan()]))
        total = torch.zeros_like(columns)
        for part, block in zip(parts, plan(), strict=True):
            total += rows[part] @ block
        columns = 1 / (n * total)
    return rows * torch.cat([block @ columns for block in plan()])


def evenly(total: int, count: int, device: torch.device) -> Tensor:
    """`count` of the numbers 0 ... total-1 at even distances, ascending."""
    return torch.div((2 * torch.arange(count, device=device) + 1) * total, 2 * max(count, 1), rounding_mode="floor")


@register_method(
    "topv",
    paper="TopV: Compatible Token Pruning with Inference Time Optimization for Fast and Low-Memory Multimodal Vision "
    "Language Model",
    year=2025,
    url="https://arxiv.org/abs/2503.18278",
    complexity="O(V²D)",
    memory="O(VD)",
    checked=Checked("", differs="written after the paper's abstract and second-hand values; no official code was seen"),
)
@dataclass(frozen=True)
class TopV(DecoderMethod):
    """TopV (CVPR 2025): one drop behind layer 2, by optimal transport from the layer's input to its normed output.

    Sources are the visual tokens that enter the layer, targets the same tokens behind its second norm. The cost adds
    feature distance (weights[0]), a Gaussian of the distance on the grid (weights[1], sigma in cells) and the distance
    to the picture's middle (weights[2]); epsilon and rounds are Sinkhorn's. Tokens that send most mass stay. recovered:
    share of the slots that go to dropped tokens at even distances instead; 0.2 is every fourth dropped token at half.
    layer: in front of which tokens go, in
    proportion for other depths than 32 where it is not given. No attention is read.

    The paper's own values are not public: weights, sigma, epsilon and the recovery are those of an unofficial
    re-implementation. Without a ratio half of the tokens stay, recovered ones among them, which is near the saving that
    the paper reports. Written so that Sinkhorn ends with the columns (see `transported`); ending with the rows, as a
    plain reading of the paper has it, ranks rounding errors.
    """

    reads: ClassVar[tuple[str, ...]] = ("entering", "middle")
    layer: int | None = option(None, low=1, example=3)
    weights: tuple[float, float, float] = option((1.0, 1.0, 0.01), low=0)
    sigma: float = option(10.0, above=0)
    epsilon: float = option(0.1, above=0)
    rounds: int = option(3, low=1)
    recovered: float = option(0.2, low=0, high=1)

    def plan(self, depth: int, share: float | None) -> Schedule:
        return Schedule(tuple((layer, 0.5 if share is None else share) for layer in at_layers(self.layer, (3,), depth)))

    def scores(self, tokens: LayerTokens) -> Tensor:
        """Mass that each candidate sends. (V,)"""
        source, target = (
            wide(check_finite(tokens.read(state)[tokens.visual], "the hidden states")) for state in self.reads
        )
        places = torch.stack([tokens.row, tokens.col], -1).to(source.dtype)
        cost = transport_cost(source, target, places, tokens.pictures[0], self.weights, self.sigma)
        return transported(cost, len(source), self.epsilon, self.rounds)

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """The best, and dropped ones at even distances."""
        n = len(tokens.visual)
        if not keep:
            return Selection(tokens.visual[:0])
        scores = self.scores(tokens)
        again = min(round_of(keep, self.recovered), n - keep)
        best = top(scores, keep - again)
        stays = torch.zeros(n, dtype=torch.bool, device=scores.device).index_fill(0, best, True)
        rest = true_indices(~stays, n - len(best))
        back = rest[evenly(len(rest), again, scores.device)]
        return Selection(torch.cat([best, back]).sort().values, info={"scores": scores})
