"""Where pruning does not pay a profile and a plan say so, and what it is bound by."""

from __future__ import annotations

import pytest

from tests.adapters.counted import layer_operations
from tokprune.profiling.devices import Device
from tokprune.profiling.doubts import HINTS, bound, doubts
from tokprune.profiling.plan import LAUNCH, OPERATIONS, Workload, plan
from tokprune.profiling.presets import preset
from tokprune.profiling.report import ProfileReport, RunResult
from tokprune.profiling.timing import Measurement

TOWERS = {"llava-1.5-7b": (0.4e12, 0.3e9)}
PARTS = ("vision", "projector", "select", "prefill", "decode", "other")


def run(name: str, columns: int, *ms: float) -> RunResult:
    """A run of PARTS in ms."""
    parts = dict(zip(PARTS, ms, strict=True))
    times = parts | {"ttft": sum(ms) - parts["decode"], "total": sum(ms), "decode_tokens_per_s": 1.0}
    measured = {key: Measurement(key, "ms", (value,)) for key, value in times.items()}
    return RunResult(name, "plain" if name == "plain" else "pruned", measured, columns, 576, columns)


def report(*cells: RunResult) -> ProfileReport:
    return ProfileReport("a model", cells, 16, 1, {})


PLAIN = run("plain", 640, 20, 1, 1, 100, 40, 1)


@pytest.mark.parametrize(
    ("reason", "plain", "pruned"),
    [
        ("tower-bound", run("plain", 640, 200, 1, 1, 20, 10, 1), run("divprune 0.1", 122, 200, 1, 3, 4, 10, 1)),
        ("decode-bound", run("plain", 640, 10, 1, 1, 20, 500, 1), run("divprune 0.1", 122, 10, 1, 3, 4, 498, 1)),
        ("launch-bound", run("plain", 640, 10, 1, 1, 60, 20, 1), run("divprune 0.1", 122, 10, 1, 3, 58, 20, 1)),
        ("choice-bound", run("plain", 640, 10, 1, 1, 60, 20, 1), run("divprune 0.1", 122, 10, 1, 50, 12, 20, 1)),
    ],
)
def test_the_reason_is_what_the_pruned_run_waits_for(reason: str, plain: RunResult, pruned: RunResult) -> None:
    assert bound(plain, pruned)[0] == reason
    (line,) = doubts(report(plain, pruned))
    assert reason in line
    assert HINTS[reason] in line
    assert line.startswith("divprune 0.1 hardly pays, ")


def test_nothing_is_said_where_pruning_pays() -> None:
    assert doubts(report(PLAIN, run("divprune 0.1", 122, 20, 1, 3, 18, 38, 1))) == []
    assert doubts(report(run("divprune 0.1", 122, 20, 1, 3, 18, 38, 1))) == []  # the plain run failed
    # The prefill is the longest part that is left, but it fell as the prompt did.
    slow = run("divprune 0.9", 582, 20, 1, 3, 91, 40, 1)
    assert "launch-bound" not in doubts(report(PLAIN, slow))[0]


def advice(place: Device, **work: int) -> str:
    made = plan(preset("llava-1.5-7b"), place, Workload((336, 336), **work), compare=False, vision=TOWERS)
    return "\n".join(made.advice)


def test_a_plan_names_what_bounds_it() -> None:
    compute = Device("slow", 10e12, 100e12, 1e15, 1.0, 1.0)
    assert "-bound" not in advice(compute, new_tokens=1)
    assert "decode-bound" in advice(Device("narrow", 100e12, 0.1e12, 1e15, 1.0, 1.0), new_tokens=500)
    huge = {"llava-1.5-7b": (400e12, 0.3e9)}
    made = plan(preset("llava-1.5-7b"), compute, Workload((336, 336), new_tokens=1), compare=False, vision=huge)
    assert any("tower-bound" in line for line in made.advice)
    fast = advice(Device("fast", 1e18, 1e15, 1e15, 1.0, 1.0), new_tokens=1)
    assert "launch-bound at ratio 1 and below" in fast
    assert f"{32 * OPERATIONS * LAUNCH * 1e3:.3g} ms" in fast


def test_a_layer_has_about_as_many_operations_as_a_plan_says() -> None:
    """On the stand-in device attention is not one kernel but some twenty."""
    assert OPERATIONS < layer_operations("llava") < OPERATIONS + 25
