"""G-Prune: spread information over the graph of similar tokens and keep where it gathers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ScoreMethod, check_finite
from tokprune.methods.options import option
from tokprune.ops.distance import cosine_similarity
from tokprune.ops.wide import wide
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens


@torch.no_grad()
def gprune(features: Tensor, threshold: float = 0.5, temperature: float = 0.03, steps: int = 5) -> Tensor:
    """Importance of each token after its information has flowed over the graph. features: (..., N, D) -> (..., N).

    Tokens with a cosine of at least `threshold` are linked; each token sends its information on in shares
    softmax(cosine / temperature) over its links. What flows at first is the norm of each token; after `steps` rounds, what
    has arrived is divided by the number of links, so that a crowd of equals does not keep all its members.
    """
    similarity = cosine_similarity(features)
    n = similarity.shape[-1]
    linked = (similarity >= threshold) & (similarity > 0) | torch.eye(n, dtype=torch.bool, device=similarity.device)
    shares = (similarity / temperature).masked_fill(~linked, -torch.inf).softmax(-1)  # (..., N, N), rows sum to 1
    flow = wide(features).norm(dim=-1)[..., None, :]  # (..., 1, N)
    for _ in range(steps):
        flow = flow @ shares
    return flow[..., 0, :] / linked.sum(-2)


@register_method(
    "gprune",
    paper="What Kind of Visual Tokens Do We Need? Training-free Visual Token Pruning from the Perspective of Graph",
    year=2025,
    url="https://arxiv.org/abs/2501.02268",
    complexity="O(N²D)",
)
@dataclass(frozen=True)
class GPrune(ScoreMethod):
    """G-Prune (AAAI 2025): visual tokens as nodes of a graph, importance by information propagation.

    It looks at the projected features only. Threshold 0.5, temperature 0.03 and 5 steps are those of the public port that a
    pruning benchmark runs (VLMUniPruneBench), whose arithmetic this follows. The port raises the whole share matrix to a
    power; here the vector is sent through it step by step, which gives the same scores. A zero token is linked to itself
    alone (there it would be linked to all). All tiles or frames of a stream are one graph.
    """

    threshold: float = option(0.5, low=-1, high=1)
    temperature: float = option(0.03, above=0)
    steps: int = option(5, low=0)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """What has arrived at each token, per link. Returns (N,)."""
        features = check_finite(tokens.features, "the visual features")
        return gprune(features, self.threshold, self.temperature, self.steps)
