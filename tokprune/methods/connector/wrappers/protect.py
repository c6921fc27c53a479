"""Protect: given tokens always stay, the method chooses the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, Wrapper, check_keep
from tokprune.methods.connector.wrappers.base import wrapped
from tokprune.methods.options import option
from tokprune.ops.merge import join
from tokprune.ops.topk import true_indices
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


@register_method(
    "protect",
    paper="wrapper: given tokens always stay, the rest by the method",
    complexity="the method's",
    memory="the method's + O(N)",
    wrapper=True,
)
@dataclass(frozen=True)
class Protect(Wrapper):
    """Always keep the tokens at the edge of each tile or frame, or at given places; the method chooses the rest.

    border: width of the protected frame, in tokens of the grid. indices: places in the stream, negative ones from its
    end. The method sees the stream without the protected tokens. If they are more than the budget, the method chooses
    among them: the count stays exact.
    """

    method: ConnectorMethod = wrapped()
    border: int = option(1, low=0, hint="It is a width in tokens; 0 is none.")
    indices: tuple[int, ...] = option((), example=(0, 1, 2))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.border == 0 and not self.indices:
            raise OptionError("nothing to protect: border=0 and no indices; write border=1, or indices=(0, 1, 2).")

    def protected(self, tokens: VisualTokens) -> Tensor:
        """Which tokens must stay. Returns (N,) bool."""
        layout, n, device = tokens.layout, len(tokens), tokens.features.device
        size = torch.tensor(layout.grids, device=layout.group.device)[layout.group]  # (N, 2)
        place = torch.stack([layout.row, layout.col], -1)
        edge = ((place < self.border) | (place >= size - self.border)).any(-1).to(device)
        wrong = [i for i in self.indices if not -n <= i < n]
        if wrong:
            raise OptionError(f"indices {wrong} do not lie in this stream of {n} tokens: {-n} <= index < {n}.")
        if self.indices:
            edge[torch.tensor([i % n for i in self.indices], device=device)] = True
        return edge

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        n = len(tokens)
        check_keep(keep, n)
        must = self.protected(tokens)
        count = int(must.sum())
        held = true_indices(must, count)
        if count == 0 or count == n:
            return self.method.select(tokens, keep)
        if count >= keep:
            return join([(held, self.method.select(tokens.part(held), keep))], tokens.features)
        rest = true_indices(~must, n - count)
        every = Selection(torch.arange(count, device=held.device))
        return join([(held, every), (rest, self.method.select(tokens.part(rest), keep - count))], tokens.features)
