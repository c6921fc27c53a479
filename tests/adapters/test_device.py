"""A pruned prefill on an accelerator, without one: no tensors of two devices meet, and the host hardly waits.

The device is `tokprune.testing.StandInDevice`, which refuses what a GPU refuses and counts what costs time there. What
pruning may add stands in the tables below, by method and family.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.counted import BUDGETED, added, placed
from tests.adapters.reference import VIDEO
from tokprune.errors import MissingSignalError
from tokprune.methods.connector.divprune import DivPrune
from tokprune.runtime import prefill
from tokprune.runtime.cache_record import PruneState
from tokprune.runtime.plan import Columns
from tokprune.runtime.records import encoder_record
from tokprune.testing import FAMILIES, StandInDevice, build, device, picture

pytestmark = pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")
QUICK = ("llava", "qwen2_5_vl")
CHEAP = ("none", "divprune", "hired")
"""Methods of the quick test."""
WAITS = 2
"""How often the host may wait for the device because of a pruned prefill: for the prompt, and for the choice."""
CHECKED = 1
"""generate() is checked once: the first step's position has to be the one that the prompt left."""
RUNTIME = 55
"""Operations that a pruned prefill may add beside those of the method, however many pictures there are."""
STEP = 4
"""Operations that a decode step may add, without a wait: the mask of the kept keys and the position."""
GATHERS = 12
"""Of these, operations that take the kept columns out of ids, features, positions and types: too few for a kernel."""
LOOP = ("ops/", "methods/", "budget.py")
SIGNAL_FILES = ("runtime/probe.py", "runtime/signals.py", "adapters/tower_parts.py", "adapters/families/")
OPERATIONS = {"divprune": 120, "hired": 150}
"""In all, but for loops that one kernel takes the place of."""


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        pytest.param(family, methods, marks=[] if quick else pytest.mark.slow)
        for family in FAMILIES
        for methods, quick in ((CHEAP, family in QUICK), (tuple(m for m in BUDGETED if m not in CHEAP), False))
    ],
)
def test_what_pruning_adds_stays_within_its_budget(family: str, methods: tuple[str, ...]) -> None:
    over: dict[str, object] = {}
    for method in methods:
        found = added(family, method)
        if found is None:
            continue  # a tower without [CLS] or blocks
        waits = found.prefill.syncs, found.answer.syncs, found.step.syncs
        gathers = found.prefill.launches - found.prefill.outside("runtime/execute.py")
        numbers = (*waits, found.prefill.outside(*LOOP, *SIGNAL_FILES), found.step.launches, gathers)
        if any(n > m for n, m in zip(numbers, (WAITS, WAITS + CHECKED, 0, RUNTIME, STEP, GATHERS), strict=True)):
            over[method] = numbers
        if found.prefill.outside("ops/") > OPERATIONS.get(method, 1000):
            over[f"operations of {method}"] = found.prefill.outside("ops/")
    assert not over, over


@pytest.mark.parametrize("method", ["none", "random", "visionzip"])
@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("internvl", "qwen3_vl"))]
)
def test_the_runtime_adds_the_same_for_one_picture_as_for_three(family: str, method: str) -> None:
    """Its plan is made on the host; what grows is the method's own work on each stream."""
    one, three = (added(family, method, pictures=n) for n in (1, 3))
    assert one is not None
    assert three is not None
    assert three.prefill.syncs == one.prefill.syncs
    assert three.prefill.outside(*LOOP, *SIGNAL_FILES) <= one.prefill.outside(*LOOP, *SIGNAL_FILES) + 1


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


@pytest.mark.parametrize("method", ["hired", "visionzip"])
@pytest.mark.parametrize(
    "family", [f if f == "qwen2_5_vl" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_signals_that_wait_for_sizes_are_those_of_a_cpu(family: str, method: str) -> None:
    """In a forward and in generate() they are laid out when the prompt is read; encoded alone, at once."""
    tiny = build(family)
    inputs = dict(
        tiny.inputs([["a", ("image", picture(56, 56)), "what is it?"], ["Colour?", ("image", picture(40, 56))]])
    )
    seen: list[dict[str, torch.Tensor]] = []
    chosen: Any = tokprune.get_method(method)

    def watch(*args: Any) -> Any:
        tokens, keeps = args[-2:]
        seen.append({f"{name} {i}": value.cpu() for i, t in enumerate(tokens) for name, value in t.signals.items()})
        return type(chosen).select_batch(chosen, tokens, keeps)

    watched = type("Watched", (type(chosen),), {"select_batch": watch})()
    try:
        pruning = tokprune.apply(tiny.model, watched, ratio=0.5)
    except MissingSignalError:
        pytest.skip("no [CLS], or no blocks")
    with torch.no_grad(), pruning:
        tiny.model(**inputs)
        with StandInDevice() as stand_in:
            stand_in.move(tiny.model)
            there = stand_in.put(inputs)
            tiny.model(**there)
            tiny.model.generate(**there, max_new_tokens=2)
            base: Any = tiny.model.base_model
            given = {n: there[n] for n in signature(base.get_image_features).parameters if n in there}
            record = encoder_record(base.get_image_features(**given, return_dict=True))
            assert record is not None
            assert record.begun is None
            assert record.signals is not None
    host, *others = seen
    assert len(others) == 2
    for other in others:
        assert other.keys() == host.keys()
        for name, value in host.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)


def test_an_exception_between_encoder_and_prompt_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed prefill began is not finished by the next call, and an encoder call that stands alone is whole."""
    here = placed("llava_next")
    base: Any = here.tiny.model.base_model
    given = {n: here.inputs[n] for n in signature(base.get_image_features).parameters if n in here.inputs}
    with torch.no_grad(), here.stand_in, tokprune.apply(here.tiny.model, "hired", ratio=0.5):
        expected = here.tiny.model(**here.inputs).logits
        with monkeypatch.context() as patch:
            patch.setattr(Columns, "of", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                here.tiny.model(**here.inputs)
            with pytest.raises(ZeroDivisionError):
                here.tiny.model.generate(**here.inputs, max_new_tokens=2)
        record = encoder_record(base.get_image_features(**given, return_dict=True))
        assert record is not None
        assert record.begun is None
        assert torch.equal(here.tiny.model(**here.inputs).logits.cpu(), expected.cpu())


OPTIONS: dict[str, dict[str, Any]] = {
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


@pytest.mark.parametrize(("method", "waits"), [("tome", WAITS), ("gemfilter", WAITS + 3)])
def test_waits_of_stages_beside_the_connector(method: str, waits: int) -> None:
    """What the encoder left is counted when the prompt is read; a first pass of the LLM waits as the model does."""
    found = added("llava", tokprune.get_method(method, **OPTIONS.get(method, {})))
    assert found is not None
    assert found.prefill.syncs <= waits
