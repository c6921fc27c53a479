"""MergeDropped: dropped tokens are averaged into the kept one nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokprune.methods.base import ConnectorMethod, Wrapper, check_finite
from tokprune.methods.connector.wrappers.base import wrapped
from tokprune.ops.merge import merge_dropped
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


@register_method(
    "merge",
    paper="wrapper: dropped tokens are averaged into the kept one nearest to them",
    complexity="the method's + O(NKD)",
    memory="the method's + O(ND)",
    merges=True,
    wrapper=True,
)
@dataclass(frozen=True)
class MergeDropped(Wrapper):
    """Average what the method drops into what it keeps: y = (y + sum of its dropped tokens) / (1 + how many).

    A dropped token goes to the kept token of highest cosine similarity. The average is handed on as merge weights, so
    DeepStack planes follow. A method that merges itself keeps its merge: only tokens that flow nowhere in it are
    averaged into its outputs, on top. into="none" leaves the dropped tokens out, for an ablation with one switch.
    """

    method: ConnectorMethod = wrapped()
    into: Literal["nearest", "none"] = "nearest"

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose for several streams, then merge in each."""
        chosen = self.method.select_batch(batch, keeps)
        if self.into == "none":
            return chosen
        return [
            merge_dropped(c, check_finite(t.features, "the visual features"))
            for c, t in zip(chosen, batch, strict=True)
        ]
