"""A pruned prefill on an accelerator, without one: no tensors of two devices meet, and the host hardly waits.

The device is `tokprune.testing.StandInDevice`, which refuses what a GPU refuses and counts what costs time there. What
pruning may add stands in the tables below, by method and family.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.counted import BUDGETED, added
from tests.adapters.reference import VIDEO
from tokprune.methods.connector.divprune import DivPrune
from tokprune.runtime import prefill
from tokprune.runtime.cache_record import PruneState
from tokprune.testing import FAMILIES, StandInDevice, build, device, picture

pytestmark = pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")
QUICK = ("llava", "qwen2_5_vl")
CHEAP = ("none", "divprune", "hired")
"""Methods of the quick test."""
WAITS = 2
"""How often the host may wait for the device because of a pruned prefill: for the prompt, and for the choice."""
CHECKED = 1
"""generate() is checked once: the first step's position has to be the one that the prompt left."""
SIGNALS = ("hired", "visionzip")
SIZED = {
    *("llava_next", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"),
    *("minicpmv4_6", "mistral3", "molmo2", "video_llama_3"),
}
"""Families that are told the sizes of pictures on the device: signals are laid out once more than the prompt is."""
RUNTIME = 55
"""Operations that a pruned prefill may add beside those of the method, however many pictures there are."""
MERGED = {"visionzip": 20}
"""Operations more a picture where dropped tokens are merged: features (and DeepStack planes) are reduced stream by
stream.
"""
STEP = 4
"""Operations that a decode step may add, without a wait: the mask of the kept keys and the position."""
GATHERS = 12
"""Of these, operations that take the kept columns out of ids, features, positions and types: too few for a kernel."""
LOOP = ("ops/", "methods/", "budget.py")
SIGNAL_FILES = ("runtime/probe.py", "runtime/signals.py", "adapters/tower_parts.py", "adapters/families/")
PER_PICTURE = 4
"""Operations that cut one more stream and its signals out of the features."""
OPERATIONS = [
    ("llava", "divprune", 120),
    ("qwen2_5_vl", "divprune", 120),
    ("llava", "hired", 150),
    ("qwen2_5_vl", "hired", 150),
]


def allowed(family: str, method: str) -> int:
    """Waits of a pruned prefill."""
    return WAITS + (family in SIZED and method in SIGNALS)


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        pytest.param(family, methods, marks=[] if quick else pytest.mark.slow)
        for family in FAMILIES
        for methods, quick in ((CHEAP, family in QUICK), (tuple(m for m in BUDGETED if m not in CHEAP), False))
    ],
)
def test_what_pruning_adds_stays_within_its_budget(family: str, methods: tuple[str, ...]) -> None:
    over = {}
    for method in methods:
        found = added(family, method)
        if found is None:
            continue  # a tower without [CLS] or blocks
        waits = found.prefill.syncs, found.answer.syncs, found.step.syncs
        gathers = found.prefill.launches - found.prefill.outside("runtime/execute.py")
        numbers = (*waits, found.prefill.outside(*LOOP, *SIGNAL_FILES), found.step.launches, gathers)
        most = allowed(family, method)
        runtime = RUNTIME + 2 * MERGED.get(method, 0)  # two rows of a picture each
        if any(n > m for n, m in zip(numbers, (most, most + CHECKED, 0, runtime, STEP, GATHERS), strict=True)):
            over[method] = numbers
    assert not over, over


@pytest.mark.parametrize("method", ["none", "random", pytest.param("visionzip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llava", pytest.param("internvl", marks=pytest.mark.slow)])
def test_the_runtime_adds_the_same_for_one_picture_as_for_three(family: str, method: str) -> None:
    """Its plan is made on the host; what grows is the method's own work on each stream."""
    one, three = (added(family, method, pictures=n) for n in (1, 3))
    assert one is not None
    assert three is not None
    assert three.prefill.syncs == one.prefill.syncs
    more = three.prefill.outside(*LOOP, *SIGNAL_FILES) - one.prefill.outside(*LOOP, *SIGNAL_FILES)
    assert more <= 2 * (PER_PICTURE + MERGED.get(method, 0))


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in VIDEO])
@pytest.mark.parametrize("method", ["divprune", "evs"])
def test_clips_stay_within_the_same_budget(family: str, method: str) -> None:
    found = added(family, method, video=True)
    assert found is not None
    assert (found.prefill.syncs <= WAITS, found.step.syncs, found.step.launches <= STEP) == (True, 0, True)


@pytest.mark.parametrize(
    ("module", "name"),
    [(prefill, "build_streams"), (DivPrune, "select_batch"), (prefill, "make_plan"), (prefill, "execute")],
    ids=lambda value: getattr(value, "__name__", value).rpartition(".")[2],
)
def test_one_hidden_wait_is_over_the_budget(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number read off the device anywhere between encoder and LLM fails the tests above, and its line is told."""
    original = getattr(module, name)

    def leaky(*args: Any, **kwargs: Any) -> Any:
        torch.ones(1, device=StandInDevice.device).item()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, leaky)
    found = added("llava", "divprune")
    assert found is not None
    assert found.prefill.syncs == WAITS + 1
    assert any(line.startswith("_local_scalar_dense @ runtime/") for line in found.prefill.run.waits)


def test_one_hidden_wait_in_a_decode_step_is_over_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PruneState.key_mask

    def leaky(state: PruneState, *args: Any, **kwargs: Any) -> Any:
        state.kept.max().item()
        return original(state, *args, **kwargs)

    monkeypatch.setattr(PruneState, "key_mask", leaky)
    found = added("llava", "random")
    assert found is not None
    assert found.step.syncs >= 1


@pytest.mark.parametrize(("family", "method", "most"), OPERATIONS)
def test_operations_of_the_methods_that_people_ask_for_first(family: str, method: str, most: int) -> None:
    """A batch of two, DivPrune's loop left out: one kernel takes its place on a GPU."""
    found = added(family, method)
    assert found is not None
    assert found.prefill.outside("ops/") <= most


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
