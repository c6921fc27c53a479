"""What tokprune can see and do inside the vision tower of a given model, each with the reason where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tokprune.adapters.base import get_adapter, unwrap
from tokprune.adapters.towers import find_tower
from tokprune.adapters.types import Model
from tokprune.errors import TokpruneError
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.methods.pixels_base import PixelMethod
from tokprune.registry import get_method, list_methods, method_class
from tokprune.runtime.encode import Recorder
from tokprune.runtime.encoder.pixels import PixelDrop
from tokprune.runtime.encoder.stage import EncoderStage
from tokprune.runtime.records import encoder_records
from tokprune.types import Inputs

SIGNALS = ("cls_attention", "received_attention:-1", "keys:-1", "encoder_features")
"""The signals that are asked for; other blocks and the other kinds are read from the same places."""


@dataclass(frozen=True)
class ReachAnswer:
    """Whether one thing works in a model."""

    works: bool
    detail: str
    """How the signal was made or what the tower did with the pictures ("" where none were given); else why it does not
    work. A fault of tokprune begins with "fault: "."""


@dataclass(frozen=True)
class Reach:
    """What can be read from a model's vision tower, and which encoder methods run in it."""

    model: str
    tower: ReachAnswer
    """Whether the encoder stage knows the tower."""
    signals: dict[str, ReachAnswer]
    """By signal."""
    encoder: dict[str, ReachAnswer]
    """By method of the encoder and the pixels stage with its defaults; those that need trained parts say so."""


def reach(model: Model, inputs: Inputs | None = None) -> Reach:
    """Look what tokprune can see and do inside the vision tower of `model`, which stays as it was.

    inputs: a call of the model with pictures or clips. With it everything is tried on these; without, the answers are
    those of `apply`, and what only a forward shows (sizes that do not fit, positions) is not known.
    """
    inner = unwrap(model)
    with torch.no_grad():
        signals = {name: _answer(_signal, inner, name, inputs) for name in SIGNALS}
        encoder = {m.info.name: _answer(_reduced, inner, m, inputs) for m in _methods()}
    return Reach(type(inner).__name__, _answer(lambda: find_tower(inner).family), signals, encoder)


def _answer(attempt: Callable[..., str], *args: object) -> ReachAnswer:
    try:
        return ReachAnswer(True, attempt(*args))
    except TokpruneError as error:
        return ReachAnswer(False, str(error))
    except Exception as error:  # whatever it is, it is ours, and the other answers are wanted
        return ReachAnswer(False, f"fault: {type(error).__name__}: {error}")


def _signal(model: Model, name: str, inputs: Inputs | None) -> str:
    """How signal `name` is made from `inputs`."""
    adapter = get_adapter(model)
    recorder = Recorder(adapter, (name,))
    if inputs is None:
        return ""
    with _installed(recorder):
        records = encoder_records(adapter.encode(inputs))
    made = [record.signals for record in records.values() if record.signals is not None]
    return "; ".join(dict.fromkeys(signals.sources[name] for signals in made))


def _reduced(model: Model, method: EncoderMethod | PixelMethod, inputs: Inputs | None) -> str:
    """What `method` leaves of the pictures of `inputs`."""
    if isinstance(method, PixelMethod):
        stage = EncoderStage(model, None, pixels=PixelDrop(method, 0.5))
    else:
        stage = EncoderStage(model, method, ratio=None if method.restores else 0.5)
    if inputs is None:
        return ""
    with _installed(stage):
        if stage.tower.vlm:
            adapter = get_adapter(model)
            with _installed(Recorder(adapter, (), encoder=stage)):  # which of the LLM's tokens are left
                adapter.encode(inputs)
        else:
            model(**inputs)
        report = stage.report()
    return f"{report.start} patches -> {' + '.join(map(str, report.left))} in {report.tower}"


@contextmanager
def _installed(part: Recorder | EncoderStage) -> Iterator[None]:
    part.install()
    try:
        yield
    finally:
        part.remove()


def _methods() -> Iterator[EncoderMethod | PixelMethod]:
    """The methods inside and in front of the tower, with their defaults; pixels are taken as -1 to 1."""
    for name in (*list_methods("encoder"), *list_methods("pixels")):
        normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if "mean" in method_class(name).__dataclass_fields__ else {}
        method = get_method(name, **normal)
        if isinstance(method, EncoderMethod | PixelMethod):
            yield method
