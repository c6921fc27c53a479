"""Watching the layers of the LLM through the decoder stage, without dropping anything: for fitting and calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tokprune.errors import OptionError
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.registry import MethodInfo
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


@dataclass(frozen=True)
class Watch(DecoderMethod):
    """Shows each prompt in front of layers 1 to the last to `look`, and keeps what it answers.

        watch = Watch(look=sums)                        # of tokprune.methods.decoder.fitprune
        with tokprune.apply(model, watch):
            for inputs in samples: model(**inputs)
        schedule = fit(watch.samples(), cost, target=0.5)

    Not registered: it is no way to prune. `below` of what is in front of layer i is the attention of layer i - 1, so
    that the last layer's is never seen.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        "watch", "no paper: what fitting and calibration look through", adaptive=True
    )
    look: Callable[[LayerTokens], Any] | None = None
    seen: dict[int, list[Any]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def plan(self, depth: int, share: float | None) -> Schedule:
        if self.look is None or share is not None:
            raise OptionError(
                "Watch(look=function) takes neither ratio nor budget, and needs a function of LayerTokens."
            )
        return Schedule(tuple((layer, 1.0) for layer in range(1, depth)))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """Everything."""
        if self.look is not None:
            self.seen.setdefault(tokens.layer, []).append(self.look(tokens))
        return Selection(torch.arange(keep, device=tokens.visual.device))

    def samples(self) -> list[list[Any]]:
        """The answers so far: for each prompt with a picture, for each layer from 1 on."""
        return [list(layers) for layers in zip(*(self.seen[layer] for layer in sorted(self.seen)), strict=True)]
