"""DART: keep a few strong pivots and, for each, the tokens that resemble it least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import option
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


def strongest(norms: Tensor, count: int) -> Tensor:
    """The pivots: the `count` largest norms, largest first, ties to the lower index. norms: (N,) ->
    (min(count, N),).
    """
    return torch.sort(norms, descending=True, stable=True).indices[:count]


@torch.no_grad()
def least_similar(features: Tensor, pivots: Tensor, counts: Sequence[int], candidates: Tensor) -> Tensor:
    """Visit the pivots one by one; each takes the candidates with the lowest cosine to it that are still there.

    features: (S, D). pivots: (P,) indices, in the order of the visit, on which the result depends. counts: how many
    each takes, at most as many in all as there are candidates. candidates: (S,) bool. Returns (sum of counts,) in the
    order taken.
    """
    rows = unit(features)
    similarity = rows[pivots] @ rows.T  # (P, S)
    free, taken = candidates.clone(), []
    for row, count in zip(similarity, counts, strict=True):
        pick = torch.sort(row.masked_fill(~free, torch.inf), stable=True).indices[:count]
        free[pick] = False
        taken.append(pick)
    return torch.cat(taken)


@register_method(
    "dart",
    paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    year=2025,
    url="https://arxiv.org/abs/2502.11494",
    complexity="O(PND)",
    memory="O(ND)",
    checked=Checked(
        "ZichenWen1/DART",
        agrees="the rule of duplication, fed with its pivots in its order",
        differs="it runs inside the LLM on keys and text pivots; here in front of it, with an exact count and pivots "
        "by falling norm",
    ),
)
@dataclass(frozen=True)
class Dart(ConnectorMethod):
    """DART (EMNLP 2025) in front of the LLM: pivots by norm, then the tokens that duplicate them least.

    The publication works inside the LLM, before layer 2, with pivots by the norm of keys and four text pivots besides;
    in front of the LLM there are no keys and no text, so pivots are the projected features of largest
    L1 norm, as third-party ports do. 4 image pivots are the published number. All tiles or frames of a stream compete.

    Differences from the published rule: exactly `keep` tokens stay, pivots included (there 4 + 8 * (keep // 8)), the
    remainder goes to the first pivots, and pivots are visited by descending norm (there in the order of a Python set,
    which changes 5 to 20 % of the kept tokens).
    """

    pivots: int = option(4, low=1)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        features = wide(check_finite(tokens.features, "the visual features"))
        pivots = strongest(features.abs().sum(-1), min(self.pivots, keep))
        each, more = divmod(keep - len(pivots), len(pivots))
        free = torch.ones(len(tokens), dtype=torch.bool, device=features.device)
        free[pivots] = False
        picks = least_similar(features, pivots, [each + (i < more) for i in range(len(pivots))], free)
        return Selection(torch.cat([pivots, picks]).sort().values, info={"pivots": pivots})
