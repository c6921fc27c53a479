"""From the encoder stage to the connector stage: a connector method sees only the tokens that the encoder left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.adapters.families import EncoderCall, UnknownGeometryError, arrange
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import ConnectorMethod, Wrapper
from tokprune.methods.connector.none import NoPruning
from tokprune.methods.options import option
from tokprune.registry import MethodInfo
from tokprune.tokens import Merge, Selection, VisualTokens

if TYPE_CHECKING:
    from tokprune.runtime.encoder.stage import EncoderStage

SIGNAL = "encoder_survivor"
ROUNDING = 1e-4
"""Weights of a resampling connector add up to 1 within this."""


def survivor_rows(encoder: EncoderStage, call: EncoderCall) -> Tensor:
    """(R,) in float32: 1 for each row of an encoder call that is the place of a group, 0 for copies and dropped tokens.

    call: the get_image_features or get_video_features call that `encoder` has just seen. Where the connector pools
    patches of several groups to a token, the token counts as a place when one of them has its place there.
    """
    trace, tower = encoder.trace, encoder.tower
    if trace is None:
        raise ValueError("the reduced tower has not run yet.")
    if tower.packed:
        return trace.survivor.float()
    share = _rows(encoder, call, trace.survivor.float())
    if encoder.pixels is not None and bool(((share > ROUNDING) & (share < 1 - ROUNDING)).any()):
        raise UnsupportedModelError(
            f"the connector of {encoder.name} makes a token of patches some of which {encoder.label!r} dropped (it "
            f"pools or resamples {call.modality}s here); a pixels method needs tokens of whole units. Methods of the "
            "connector stage work on its output."
        )
    return (share > 0).float()


def worth_rows(encoder: EncoderStage, call: EncoderCall) -> Tensor:
    """(R,) in float32: by which a pixels method ranks each row of an encoder call, 0 for rows that are no units."""
    trace = encoder.trace
    if trace is None or trace.worth is None:
        raise ValueError("no pixels method has seen this call.")
    return trace.worth if encoder.tower.packed else _rows(encoder, call, trace.worth)


def _rows(encoder: EncoderStage, call: EncoderCall, values: Tensor) -> Tensor:
    """Values of patches or units (images, n) of a tower with equal pictures as values of the rows, (R,)."""
    tower = encoder.tower
    if tower.fold > 1 and tower.unit_order is not None:
        order = tower.unit_order(values.shape[1] * tower.fold).to(values.device)
        patches = values.repeat_interleave(tower.fold, 1)
        values = torch.empty_like(patches).index_copy_(1, order, patches)
    try:
        return arrange(call, values.flatten())
    except UnknownGeometryError as error:
        raise UnsupportedModelError(
            f"the tokens that {encoder.label!r} left inside the vision tower of {encoder.name} cannot be "
            f"matched with those that its LLM reads ({error}); tokprune.runtime.encoder.apply_encoder reduces the "
            "tower alone."
        ) from None


@dataclass(frozen=True)
class AmongSurvivors(Wrapper):
    """A connector method that sees only the tokens which the encoder stage left; by default it keeps all of these.

    Not registered: the encoder stage wraps with it. The budget is the whole stream's: `keep` of N tokens, less where
    fewer survived.
    """

    method: ConnectorMethod = option(factory=NoPruning)

    @property
    def info(self) -> MethodInfo:  # type: ignore[override]
        """The wrapped method's facts; the count is the encoder's where it is smaller."""
        if isinstance(self.method, NoPruning):
            return MethodInfo("survivors", "tokens that the encoder stage left", adaptive=True)
        return replace(self.method.info, adaptive=True)

    @property
    def needs(self) -> tuple[str, ...]:
        """Which tokens survived, and what the wrapped method needs."""
        return (SIGNAL, *self.method.needs)

    @property
    def drops_at_full_budget(self) -> bool:
        """Always: what did not survive goes, whatever the budget."""
        return True

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """The wrapped method's rule over the survivors of each stream, for as many tokens as these can fill."""
        return self.method.budgets(*self.survivors(batch, keeps)[1:])

    def bounds(self, tokens: VisualTokens) -> tuple[int, int]:
        """Those of the wrapped method among the survivors."""
        return self.method.bounds(tokens.part(self.places(tokens)))

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Choose among the survivors of each stream."""
        places, parts, counts = self.survivors(batch, keeps)
        chosen = self.method.select_batch(parts, counts)
        return [
            self.outward(selection, place.to(selection.indices.device), len(tokens))
            for selection, place, tokens in zip(chosen, places, batch, strict=True)
        ]

    def survivors(
        self, batch: Sequence[VisualTokens], keeps: Sequence[int]
    ) -> tuple[list[Tensor], list[VisualTokens], list[int]]:
        """Where the survivors of each stream lie, these as streams of their own, and how many of them may stay."""
        places = [self.places(tokens) for tokens in batch]
        parts = [tokens.part(place) for tokens, place in zip(batch, places, strict=True)]
        return places, parts, [min(keep, len(place)) for keep, place in zip(keeps, places, strict=True)]

    def places(self, tokens: VisualTokens) -> Tensor:
        """Ascending positions of the survivors; all of a stream that lost them (cut away by unpadding)."""
        place = (tokens.signal(SIGNAL) > 0).nonzero()[:, 0]
        return place if len(place) else torch.arange(len(tokens), device=place.device)

    @staticmethod
    def outward(selection: Selection, place: Tensor, n: int) -> Selection:
        """A selection among `place` as one of the whole stream of `n` tokens."""
        weights = selection.weights
        if weights is not None and weights.rows is not None:
            rows = weights.rows.to_dense() if weights.rows.is_sparse else weights.rows
            weights = Merge(rows=rows.new_zeros(len(selection), n).index_copy_(1, place, rows))
        elif weights is not None and weights.target is not None and weights.scale is not None:
            target = weights.target.new_full((n,), -1).index_copy_(0, place, weights.target)
            weights = Merge(target, weights.scale.new_zeros(n).index_copy_(0, place, weights.scale))
        info = {k: v for k, v in selection.info.items() if v.shape[:1] != place.shape}
        return Selection(place[selection.indices], weights, selection.features, info)
