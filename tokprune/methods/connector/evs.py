"""EVS: keep the first frame, and what changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import share
from tokprune.methods.base import ScoreMethod, check_finite, top
from tokprune.methods.connector.uniform import uniform
from tokprune.methods.options import Compat
from tokprune.ops.frames import earlier, similarity_to
from tokprune.ops.numeric import wide
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens

FIRST = 255.0  # above every change: a token without a predecessor is new as a whole


@register_method(
    "evs",
    paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2510.14624",
    complexity="O(ND)",
    memory="O(ND)",
    checked=Checked(
        "vllm-project/vllm",
        "masks, counts and positions on the golden vectors",
        "ties, which rounding decides there; budgets below one frame",
    ),
)
@dataclass(frozen=True)
class EVS(ScoreMethod):
    """EVS (2025, as in vLLM): one budget for the whole video, given to the tokens that differ most from the frame
    before.

    Query-free, O(ND); the first frame stays whole. What differs from the code in vLLM, which compat="published"
    restores:
    - a budget below the size of the first frame is raised to it there. Here it is met: the first frame gets its
      proportional share of the budget, spread evenly over the picture, and the most changed tokens get the rest.
    - changes are rounded to 1e-6 in both, so that ties go to the lower index (in vLLM, to rounding noise). (Its count,
      int((1 - q) n), also loses a token to rounding for some q; counts are not made here.)

    A picture, or a tile, has no earlier frame: its share is spread evenly. Frames of different sizes are compared where
    both have a token; one whose place is new counts as changed.
    """

    compat: Compat = "corrected"

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Change since the frame before: 1 - cosine at the same place; 255 where there is none. Returns (N,) in
        float32.

        Rounded to 1e-6, so that a static video is one big tie rather than rounding noise that differs between devices.
        """
        features = check_finite(wide(tokens.features), "the visual features")
        before = earlier(tokens.layout.to(features.device))
        return (1 - similarity_to(features, before, 1 - FIRST)).mul(1e6).round().div(1e6)

    def choose(self, tokens: VisualTokens, scores: Tensor, keep: int) -> Tensor:
        """The first frame and the most changed tokens."""
        layout = tokens.layout
        sizes = list(layout.group_sizes)
        if layout.kind != "video":
            return uniform(layout.to(scores.device), share(keep, sizes, sizes))
        if keep >= sizes[0] or self.compat == "published":
            return top(scores, max(keep, sizes[0]))
        first = max(1, (2 * keep * sizes[0] + sum(sizes)) // (2 * sum(sizes)))
        budgets = [first] + [0] * (len(sizes) - 1)
        chosen = uniform(layout.to(scores.device), budgets)
        later = top(scores[sizes[0] :], keep - first) + sizes[0]
        return torch.cat([chosen, later])
