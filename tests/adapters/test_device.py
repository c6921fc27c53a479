"""A pruned prefill on an accelerator, without one: no tensors of two devices meet, and the host hardly waits.

The device is `tokprune.testing.StandInDevice`, which refuses what a GPU refuses and counts what costs time there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tokprune.errors import MissingSignalError
from tokprune.testing import FAMILIES, StandInDevice, build, device, picture

pytestmark = pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")
QUICK = ("llava", "qwen2_5_vl")
WAITS = {"none": 2, "random": 2, "divprune": 2, "cdpruner": 2, "evs": 2, "hired": 3, "visionzip": 3, "quota": 3}
"""How often the host may wait for the device because of pruning: once for the prompt and once for the choice; a third
time for methods that lay out signals, where the sizes of pictures are on the device."""
SHOWN = ("internvl", "minicpmv4_6", "aya_vision", "cohere2_vision", "perception_lm", "molmo2")
MORE = {**dict.fromkeys(SHOWN, 2), "llava_onevision": 8}
"""Families that tell thumbnails from tiles by what they show ask once more a picture; OneVision traces its packing."""


def cost(model: Any, inputs: Any, stand_in: StandInDevice) -> Any:
    model(**inputs)  # the first run fills caches
    with stand_in.count() as counted:
        model(**inputs)
    return counted


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_the_host_waits_as_often_as_the_budget_says(family: str) -> None:
    tiny = build(family)
    inputs = dict(
        tiny.inputs([["a", ("image", picture(56, 56)), "what?"], ["b", ("image", picture(56, 56)), "it is?"]])
    )
    found = {}
    with torch.no_grad(), StandInDevice() as stand_in:
        stand_in.move(tiny.model)
        placed = stand_in.put(inputs)
        plain = cost(tiny.model, placed, stand_in)
        for method in WAITS:
            try:
                pruning = tokprune.apply(tiny.model, method, ratio=0.25, query="what?", processor=tiny.processor)
            except MissingSignalError:
                continue  # a tower without [CLS] or blocks
            with pruning:
                counted = cost(tiny.model, placed, stand_in)
            found[method] = (counted.syncs - plain.syncs, counted.waits - plain.waits)
    over = {m: f for m, f in found.items() if f[0] > WAITS[m] + MORE.get(family, 0)}
    assert not over, over


OPTIONS = {
    "gemfilter": {"layer": 1},
    "pyramiddrop": {"layers": (1,), "shares": (0.5,)},
    "sparsevlm": {"layers": (1,)},
    "mustdrop": {"layers": (1,)},
}
"""Layers that the tiny model has."""


@pytest.mark.parametrize("method", [*OPTIONS, "fitprune", "tome"])
def test_stages_beside_the_connector_run_on_a_device(method: str) -> None:
    """No tensor of the host meets one of the device, and the answer is that of the CPU."""
    tiny = build("llava")
    first, second = ("image", picture(56, 56)), ("image", picture(40, 56))
    inputs = dict(tiny.inputs([["a", first, "what is it?"], ["Colour?", second]]))
    chosen = tokprune.get_method(method, **OPTIONS.get(method, {}))
    with torch.no_grad(), tokprune.apply(tiny.model, chosen, ratio=0.5, processor=tiny.processor):
        expected = tiny.model(**inputs).logits
        with StandInDevice() as stand_in:
            stand_in.move(tiny.model)
            found = tiny.model(**stand_in.put(inputs)).logits
            assert torch.allclose(found.cpu(), expected, atol=1e-4)
