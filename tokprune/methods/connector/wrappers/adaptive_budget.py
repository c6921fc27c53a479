"""AdaptiveBudget: give each image of a prompt its budget from its resolution and from how much is on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import floor_of, share
from tokprune.methods.base import ConnectorMethod, Wrapper, check_finite
from tokprune.methods.connector.wrappers.base import wrapped
from tokprune.methods.options import option
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens


@torch.no_grad()
def distinct_tokens(features: Tensor, origin: Tensor) -> Tensor:
    """Effective number of different tokens of an image: 1 / mean of the squared cosines of all pairs.

    features: (N, D). origin: (D,) point from which directions are measured. Returns a scalar between 1 (all alike) and
    N (all orthogonal): the participation ratio of the spectrum. Tokens that lie on the origin count as alike.
    """
    rows = unit(wide(features) - origin)
    n, d = rows.shape
    gram = rows @ rows.T if n <= d else rows.T @ rows  # both have the same sum of squares
    # Zero rows (tokens on the origin) would look orthogonal to all; they are one and the same token.
    zero = (rows.square().sum(-1) < 0.5).sum()
    return n * n / (gram.square().sum() + zero * zero)


@register_method(
    "adaptive_budget",
    paper="wrapper (ours): dynamic budgets, after AdaptVision: Efficient Vision-Language Models via Adaptive Visual "
    "Acquisition",
    year=2025,
    url="https://arxiv.org/abs/2512.03794",
    complexity="the method's + O(N D min(N, D))",
    memory="the method's + O(ND)",
    wrapper=True,
)
@dataclass(frozen=True)
class AdaptiveBudget(Wrapper):
    """Dynamic budgets for any connector method: busy and large images of a prompt keep more, plain and small ones less.

    AdaptVision (2025) learns by reinforcement how many visual tokens a picture is worth; that needs its training. This
    is a rule in its spirit, and ours: image i of a prompt weighs N_i^(1 - density) * distinct_i^density, where N_i is
    its number of tokens (resolution) and distinct_i its effective number of different tokens (information), both in
    tokens; directions are measured from the mean of all tokens of the prompt, so that what the images share does not
    count. Whatever total ratio or budget give the prompt is kept exactly: each image first gets `least` of its own fair
    share (one token at the least), and all that is left is shared out in proportion to the weights.

    method: what picks the tokens; a rule of its own for sharing budgets is not asked. density: 0 looks at resolution
    alone, 1 at content alone. A prompt with one image keeps its budget.
    """

    method: ConnectorMethod = wrapped()
    density: float = option(0.5, low=0, high=1)
    least: float = option(0.25, low=0, high=1)

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """Share the prompt's tokens between its images by resolution and content. One host synchronisation."""
        if len(batch) < 2:
            return list(keeps)
        parts = [wide(check_finite(t.features, "the visual features")) for t in batch]
        sizes = [len(t) for t in batch]
        origin = torch.stack([x.sum(0) for x in parts]).sum(0) / sum(sizes)
        distinct = torch.stack([distinct_tokens(x, origin) for x in parts]).tolist()
        weights = [n ** (1 - self.density) * d**self.density for n, d in zip(sizes, distinct, strict=True)]
        base = [max(1, floor_of(k, self.least)) for k in keeps]
        more = share(sum(keeps) - sum(base), weights, [n - b for n, b in zip(sizes, base, strict=True)])
        return [b + m for b, m in zip(base, more, strict=True)]
