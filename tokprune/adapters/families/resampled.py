"""Projectors whose tokens are answers to learned queries: Aria, Idefics 2."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from tokprune.adapters.families.base import EncoderCall, Family, StreamLayout, UnknownGeometryError, register_family


@register_family("aria", "idefics2")
class Resampled(Family):
    """No token stands for a place in the picture, so nothing of a patch can be said of a token."""

    def _no_place(self) -> NoReturn:
        raise UnknownGeometryError("its projector makes tokens of learned queries, which stand for no place")

    def patches(self, call: EncoderCall) -> int | None:
        self._no_place()

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        self._no_place()

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        self._no_place()
