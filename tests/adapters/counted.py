"""What pruning adds to a prefill and to a decode step on the stand-in device: waits of the host, and operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import tokprune
from tokprune.errors import MissingSignalError
from tokprune.testing import StandInDevice, TinyVLM, build, clip, picture
from tokprune.testing.device import Cost

BUDGETED = ("none", "random", "divprune", "hired", "visionzip", "cdpruner", "evs", "quota")
"""One method of each kind: without and with signals of the tower, a question, a loop, a clip, the frames stage."""


@dataclass(frozen=True)
class Placed:
    """A tiny model on the stand-in device with one call, and what that costs unpruned."""

    tiny: TinyVLM
    inputs: Mapping[str, Any]
    stand_in: StandInDevice
    prefill: Cost
    step: Cost
    answer: Cost


@dataclass(frozen=True)
class Added:
    """What one run has more than another."""

    run: Cost
    plain: Cost

    @property
    def launches(self) -> int:
        """Operations."""
        return self.run.launches - self.plain.launches

    @property
    def syncs(self) -> int:
        """Waits of the host."""
        return self.run.syncs - self.plain.syncs

    def outside(self, *files: str) -> int:
        """Operations but for those of some files of the package, such as a greedy loop's."""
        return self.launches - sum(n for line, n in self.run.by_line.items() if line.startswith(files))


def cost(run: Callable[[], object], stand_in: StandInDevice, warm: bool = False) -> Cost:
    """What a call costs; warm: the second one, for the first one fills caches."""
    if warm:
        run()
    with stand_in.count() as counted:
        run()
    return counted


class Counts(NamedTuple):
    """What a method adds."""

    prefill: Added
    """To a forward over the prompts."""
    step: Added
    """To a decode step of generate()."""
    answer: Added
    """To generate() of three tokens in all."""


def _answers(tiny: TinyVLM, inputs: Mapping[str, Any], stand_in: StandInDevice) -> tuple[Cost, Cost]:
    """A decode step of generate(), what a fourth token costs over three, and the three. Lines of a step are not told
    apart."""

    def answer(tokens: int) -> Cost:
        return cost(lambda: tiny.model.generate(**inputs, max_new_tokens=tokens), stand_in)

    three, four = answer(3), answer(4)
    return Cost(four.launches - three.launches, 0, four.by_line - three.by_line, four.waits - three.waits), three


def parts(pictures: int = 1, video: bool = False) -> list[list[Any]]:
    """Two prompts with the same number of equal pictures, or a clip each."""
    shown: list[Any] = [("video", clip(4))] if video else [("image", picture(56, 56))] * pictures
    return [["a", *shown, "what?"], ["b", *shown, "it is?"]]


@functools.lru_cache(maxsize=2)
def placed(family: str, pictures: int = 1, video: bool = False) -> Placed:
    """The model of a family with two prompts of some pictures, or of a clip each."""
    tiny = build(family)
    inputs = dict(tiny.inputs(parts(pictures, video)))
    with torch.no_grad(), StandInDevice() as stand_in:
        stand_in.move(tiny.model)
        on_device = stand_in.put(inputs)
        prefill = cost(lambda: tiny.model(**on_device), stand_in, warm=True)
        return Placed(tiny, on_device, stand_in, prefill, *_answers(tiny, on_device, stand_in))


def added(family: str, method: Any, pictures: int = 1, video: bool = False) -> Counts | None:
    """What a method adds; None where the tower has not what it needs."""
    here = placed(family, pictures, video)
    model, stand_in = here.tiny.model, here.stand_in
    with torch.no_grad(), stand_in:
        try:
            pruning = tokprune.apply(model, method, ratio=0.25, query="what?", processor=here.tiny.processor)
        except MissingSignalError:
            return None
        with pruning:
            prefill = cost(lambda: model(**here.inputs), stand_in, warm=True)
            step, answer = _answers(here.tiny, here.inputs, stand_in)
    return Counts(Added(prefill, here.prefill), Added(step, here.step), Added(answer, here.answer))


def layer_operations(family: str) -> float:
    """Operations that one more layer of the LLM adds to a prefill."""
    costs = []
    for layers in (2, 3):
        tiny = build(family, layers=layers)
        with torch.no_grad(), StandInDevice() as stand_in:
            inputs = stand_in.put(dict(tiny.inputs(parts())))
            model = stand_in.move(tiny.model)
            costs.append(cost(lambda m=model, i=inputs: m(**i), stand_in, warm=True).launches)  # type: ignore[misc]
    return costs[1] - costs[0]
