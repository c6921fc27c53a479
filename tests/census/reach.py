"""Which stages and signals a model of a type can have, asked of the code: applied, run once, or the words it refuses
with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tests.census.proof import Inputs, pruned
from tokprune.errors import TokpruneError
from tokprune.methods.base import ConnectorMethod
from tokprune.registry import MethodInfo, get_method
from tokprune.tokens import Selection, VisualTokens

SIGNALS = ("cls_attention", "received_attention:-1", "keys:-1", "encoder_features")


@dataclass(frozen=True)
class Asks(ConnectorMethod):
    """Keeps the first tokens and reads one signal."""

    info: ClassVar[MethodInfo] = MethodInfo(name="asks", paper="none", complexity="O(1)")
    signal: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Of the vision tower."""
        return (self.signal,)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """The first, once the signal has been looked at."""
        assert tokens.signals[self.signal].shape[0] == len(tokens)
        assert torch.isfinite(tokens.signals[self.signal]).all()
        return Selection(torch.arange(keep))


def stages() -> Iterator[tuple[str, Any]]:
    """A method of each stage beside the connector's, where there is one."""
    yield "encoder", get_method("tome", r=2)
    yield "decoder", get_method("fastv", layer=1)
    yield "cache", get_method("dycoke_cache", layer=1)


def reach(model: Any, inputs: Inputs) -> dict[str, str]:
    """Stage or signal -> "" where it ran, else why it is refused."""
    out = {stage: tried(model, inputs, method) for stage, method in stages()}
    return out | {name: tried(model, inputs, Asks(signal=name)) for name in SIGNALS}


def tried(model: Any, inputs: Inputs, method: Any) -> str:
    """Why a method is refused on a model; "" where one answer came."""
    options: dict[str, Any] = {"ratio": None if getattr(method, "stage", "") == "encoder" else 0.5}
    try:
        with pruned(model, method, **options), torch.no_grad():
            model.generate(**inputs, max_new_tokens=2)
    except TokpruneError as error:
        return str(error).split(". ")[0]
    return ""
