"""How many visual tokens each layer of the LLM works on: shares by layer, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokprune.budget import kept
from tokprune.errors import OptionError


@dataclass(frozen=True)
class Schedule:
    """From which layer on which share of the visual tokens is left.

    Raises OptionError where layers do not ascend from 1, or shares rise or leave [0, 1].
    """

    steps: tuple[tuple[int, float], ...]
    """(layer, share): in front of this layer (0-based) the visual tokens are cut to that share of those that entered
    the LLM. Before the first step all of them are there; a share of 0 leaves none."""

    def __post_init__(self) -> None:
        steps = tuple((int(layer), float(share)) for layer, share in self.steps)
        object.__setattr__(self, "steps", steps)
        layers, shares = [s[0] for s in steps], [s[1] for s in steps]
        if not steps or layers != sorted(set(layers)) or layers[0] < 1:
            raise OptionError(
                f"schedule={self.steps!r}: layers must ascend from 1 on (what should not reach the LLM at all "
                "is dropped by a connector method). Write schedule=((2, 0.5),) to halve the tokens in front of layer 2."
            )
        if any(not (math.isfinite(s) and 0 <= s <= 1) for s in shares) or shares != sorted(shares, reverse=True):
            raise OptionError(f"schedule={self.steps!r}: shares lie in [0, 1] and never rise from layer to layer.")

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in front of which tokens are dropped."""
        return tuple(layer for layer, _ in self.steps)

    @property
    def last(self) -> float:
        """Share left behind the last drop."""
        return self.steps[-1][1]

    def share(self, layer: int) -> float:
        """Share of the visual tokens that this layer works on."""
        return next((share for at, share in reversed(self.steps) if at <= layer), 1.0)

    def counts(self, total: int, final: int | None = None) -> list[int]:
        """Visual tokens left by each step, of `total` that entered the LLM; never rising.

        final: exact count behind the last step, where a ratio or budget says it.
        """
        counts = [kept(total, share) if share and total else 0 for _, share in self.steps]
        if final is not None:
            counts = [max(count, final) for count in counts[:-1]] + [final]
        return counts

    def average(self, depth: int) -> float:
        """Mean share over the `depth` layers of the LLM: what each layer really works on."""
        return sum(self.share(layer) for layer in range(depth)) / depth

    @staticmethod
    def geometric(layers: Sequence[int], last: float) -> Schedule:
        """Equal factors from step to step that end at the share `last`: (8, 16, 24), 1/8 gives 1/2, 1/4, 1/8."""
        return Schedule(tuple((layer, last ** ((i + 1) / len(layers))) for i, layer in enumerate(layers)))
