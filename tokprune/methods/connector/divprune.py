"""DivPrune: keep the tokens that differ most from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokprune.methods.base import ConnectorMethod, check_finite, check_keep, solve_alike
from tokprune.ops.select import greedy_farthest
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def divprune(features: Tensor, keep: int) -> Tensor:
    """Greedy max-min choice on the cosine distance (sections 3.2 and 3.3 of the paper).

    features: (B, N, D) -> (B, keep) indices in the order of choice. The first token is the one whose nearest neighbour
    is farthest; each further one maximises the distance to its nearest chosen token, ties to the lower index. Distances
    are float32 whatever the model's dtype: in half precision the choice is rounding noise.
    """
    return greedy_farthest(features, keep)


@register_method(
    "divprune",
    paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    year=2025,
    url="https://arxiv.org/abs/2503.02175",
    complexity="O(N²D + KN)",
    memory="O(ND)",
    checked=Checked(
        "vbdi/divprune",
        agrees="the picks and their order, on random and clustered features",
        differs="repeated tokens, which it picks twice; zero norms; half precision, in which it selects",
    ),
)
@dataclass(frozen=True)
class DivPrune(ConnectorMethod):
    """DivPrune (CVPR 2025): the subset of tokens with the largest minimum distance between its members.

    It looks at the projected features only: no attention, no question. All tiles or frames of a stream compete.
    The published code may pick a token twice when features repeat (64 tokens with 8 distinct values, 16 asked: 8
    unique), divides by zero norms, and selects in the model's dtype. Here a token is never picked twice, norms are
    clamped and distances are float32.
    """

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams; those of equal size and budget share one call."""
        problems = []
        for tokens, keep in zip(batch, keeps, strict=True):
            check_keep(keep, len(tokens))
            problems.append(([check_finite(tokens.features, "the visual features")], keep))
        return [Selection(order.sort().values) for order in solve_alike(problems, divprune)]
