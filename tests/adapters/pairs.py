"""A method that merges every two neighbours, with weights that are known by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokprune.methods.base import ConnectorMethod
from tokprune.registry import MethodInfo
from tokprune.tokens import Merge, Selection, VisualTokens

# -- merging -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs(ConnectorMethod):
    """Averages neighbours: token 2k becomes the weighted mean of 2k and 2k+1. `form` says how the merge is written.

    seen: collects the features of the streams, so that a test can find their columns again.
    """

    form: str = "target"
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Keep the first `keep` even tokens; an odd one out goes alone."""
        self.seen.append(tokens.features)
        weights = pair_weights(len(tokens), keep)
        indices = torch.arange(keep) * 2
        if self.form == "features":
            return Selection(indices, features=weights @ tokens.features)
        if self.form == "rows":
            return Selection(indices, Merge(rows=weights))
        if self.form == "sparse":
            return Selection(indices, Merge(rows=weights.to_sparse()))
        into = weights.sum(0) > 0
        return Selection(indices, Merge(target=torch.where(into, weights.argmax(0), -1), scale=weights.sum(0)))


Pairs.info = MethodInfo("pairs", "test", merges=True)


def pair_weights(n: int, keep: int) -> Tensor:
    """(keep, n) weights of `Pairs`: 0.75 and 0.25, or 1 for a token without neighbour."""
    weights = torch.zeros(keep, n)
    for k in range(keep):
        weights[k, 2 * k] = 0.75 if 2 * k + 1 < n else 1.0
        weights[k, 2 * k + 1 : 2 * k + 2] = 0.25
    return weights
