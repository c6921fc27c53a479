"""The numbers of a heat map: a signal of the vision tower, or a method's scores, for one picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import tokprune
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.registry import MethodInfo
from tokprune.tokens import Layout, Selection, VisualTokens
from tokprune.types import VLM, Inputs, Processor

VALUES = "values"


@dataclass(frozen=True)
class SignalProbe(ConnectorMethod):
    """Notes one signal of the stream and keeps the first tokens: for looking, not for pruning."""

    signal: str = "cls_attention"
    info: ClassVar[MethodInfo] = MethodInfo("signal_probe", "looks at a signal")

    @property
    def needs(self) -> tuple[str, ...]:
        """The one signal."""
        return (self.signal,)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """The first `keep` tokens, with the signal as a number per token in `info`: vectors by their length."""
        values = tokens.signal(self.signal).float()
        while values.ndim > 1:
            values = values.norm(dim=-1)
        return Selection(torch.arange(keep, device=values.device), info={VALUES: values})


def values_of(
    model: VLM,
    inputs: Inputs,
    *,
    signal: str | None = None,
    method: str | None = None,
    ratio: float = 0.1,
    processor: Processor | None = None,
    scorer: object = None,
) -> tuple[Tensor, Layout, str]:
    """(N,) values of the first picture of `inputs`, its layout, and how they were obtained.

    signal: a name such as "cls_attention", "received_attention:8" or "keys:-1" (its length per token). method: or the
    name of a method, for its scores. Raises OptionError for methods that score nothing, MissingSignalError for what the
    tower has not.
    """
    if (signal is None) == (method is None):
        raise OptionError(f"signal={signal!r}, method={method!r}; give one of them.")
    chosen = SignalProbe(signal) if signal is not None else method or ""
    # Half of the tokens for a signal: with all of them nothing would be asked.
    ratio = 0.5 if signal is not None else ratio
    with tokprune.apply(model, chosen, ratio=ratio, processor=processor, scorer=scorer) as pruning, torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        last = pruning.last
    if last is None or not last.streams:
        raise OptionError("the prompt holds no picture.")
    record = last.streams[0]
    values = record.selection.info.get(VALUES if signal is not None else "scores")
    if values is None or values.ndim != 1 or len(values) != len(record.layout.group):
        raise OptionError(
            f"method {method!r} gives no score per token (it chooses by distances, groups or chance); draw what it "
            f"keeps with tokprune show, or a signal: --signal cls_attention."
        )
    source = record.sources.get(signal, "") if signal is not None else f"scores of {method}"
    return values.detach().float().cpu(), record.layout, source
