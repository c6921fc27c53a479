"""G-Prune: spread information over the graph of similar tokens and keep where it gathers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import share
from tokprune.methods.base import ScoreMethod, check_finite
from tokprune.methods.options import option
from tokprune.ops.blocks import row_blocks
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import gram, unit
from tokprune.ops.topk import grouped_top, top
from tokprune.registry import Checked, register_method
from tokprune.tokens import Layout, VisualTokens


@torch.no_grad()
def gprune(features: Tensor, threshold: float = 0.5, temperature: float = 0.03, steps: int = 5) -> Tensor:
    """Importance of each token after its information has flowed over the graph. features: (..., N, D) -> (..., N).

    Tokens with a cosine of at least `threshold` are linked; each token sends its information on in shares
    softmax(cosine / temperature) over its links. What flows at first is the norm of each token; after `steps` rounds,
    what has arrived is divided by the number of links, so that a crowd of equals does not keep all its members.
    """
    rows = unit(features)
    parts = list(row_blocks(rows.shape[-2]))  # one, or as many as fit; those are made anew in every step

    def block(part: slice) -> tuple[Tensor, Tensor]:
        similarity = gram(rows) if len(parts) == 1 else rows[..., part, :] @ rows.mT  # (..., m, N)
        linked = (similarity >= threshold) & (similarity > 0)
        linked.diagonal(part.start, -2, -1).fill_(True)
        shares = similarity.div_(temperature).masked_fill_(~linked, -torch.inf).softmax(-1)  # rows sum to 1
        return shares, linked.sum(-2)

    held = [block(part) for part in parts[:1]]
    links = held[0][1].clone()
    for part in parts[1:]:
        links += block(part)[1]
    flow = wide(features).norm(dim=-1)[..., None, :]  # (..., 1, N)
    for _ in range(steps):
        made = held if len(parts) == 1 else map(block, parts)
        flow = sum((flow[..., p] @ shares for p, (shares, _) in zip(parts, made, strict=True)), torch.zeros_like(flow))
    return flow[..., 0, :] / links


@register_method(
    "gprune",
    paper="What Kind of Visual Tokens Do We Need? Training-Free Visual Token Pruning for Multi-Modal Large Language "
    "Models from the Perspective of Graph",
    year=2025,
    url="https://arxiv.org/abs/2501.02268",
    complexity="O(N²D)",
    memory="O(ND)",
    checked=Checked(
        "jytmelon/G-Prune",
        agrees="kept tokens of thumbnail and canvas, random, clustered and repeated features, up to 2,880 tokens",
        differs="zero tokens; counts, which it rounds down; half precision, in which it runs",
    ),
)
@dataclass(frozen=True)
class GPrune(ScoreMethod):
    """G-Prune (AAAI 2025): visual tokens as nodes of a graph, importance by information propagation.

    It looks at the projected features only. Threshold 0.5, temperature 0.03 and 5 steps are the published settings. As
    published, a tiled picture is two graphs, the thumbnail and all other tiles together, each of which keeps the same
    ratio (the code rounds both counts down, here they add up to the budget). Other tiles and frames of a stream are one
    graph.

    The code raises the whole share matrix to a power; here the vector is sent through it step by step, which gives the
    same scores. It links a zero token to all others; here it is linked to itself alone. In half precision its shares
    below 6e-8 vanish from its count of links; here they are float32.
    """

    threshold: float = option(0.5, low=-1, high=1)
    temperature: float = option(0.03, above=0)
    steps: int = option(5, low=0)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """What has arrived at each token, per link. Returns (N,)."""
        features = check_finite(tokens.features, "the visual features")
        graphs = features.split(_graphs(tokens.layout))
        return torch.cat([gprune(x, self.threshold, self.temperature, self.steps) for x in graphs])

    def choose(self, tokens: VisualTokens, scores: Tensor, keep: int) -> Tensor:
        """The best of each graph, the same share of each."""
        sizes = _graphs(tokens.layout)
        if len(sizes) == 1:
            return top(scores, keep)
        graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes), output_size=len(scores))
        return grouped_top(scores, graph, share(keep, sizes, sizes))


def _graphs(layout: Layout) -> list[int]:
    """Sizes of the graphs that a stream consists of, one after the other."""
    sizes = layout.group_sizes
    return [sizes[0], sum(sizes[1:])] if layout.thumbnail and len(sizes) > 1 else [sum(sizes)]
