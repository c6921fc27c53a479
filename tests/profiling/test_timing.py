"""Clocks and medians; the stages of a call add up to its wall time."""

from __future__ import annotations

import time

import pytest
import torch

from tokprune.errors import OptionError
from tokprune.profiling.stages import STAGES, find_stages
from tokprune.profiling.timing import Measurement, StageClock, interleave, rounds
from tokprune.testing import build, picture


def test_median_spread_and_round_trip() -> None:
    m = Measurement("ttft", "ms", (5.0, 1.0, 2.0, 100.0, 3.0))
    assert m.median == 3.0
    assert m.spread == 1.5  # quartiles 2 and 5
    assert str(m) == "3 ± 1.5 ms"
    assert Measurement.from_dict("ttft", m.to_dict()) == m
    assert Measurement("x", "ms", (1.0,)).spread == 0.0


def test_every_round_visits_every_cell_and_positions_change() -> None:
    names = ["a", "b", "c"]
    plan = rounds(names, 6)
    assert all(sorted(order) == names for order in plan)
    for name in names:
        assert len({order.index(name) for order in plan}) == 3
    assert rounds(["a", "b"], 4) == [["a", "b"], ["b", "a"], ["b", "a"], ["a", "b"]]


def test_interleave_records_after_the_warm_up_and_drops_failing_cells() -> None:
    log: list[str] = []

    def cell(name: str, fail_at: int = 99) -> dict[str, float]:
        log.append(name)
        if log.count(name) >= fail_at:
            raise torch.OutOfMemoryError("too large")
        return {"total": float(log.count(name))}

    failed: dict[str, str] = {}

    def note(name: str, error: BaseException) -> bool:
        failed[name] = str(error)
        return True

    out = interleave({"a": lambda: cell("a"), "b": lambda: cell("b", 3)}, repeats=3, warmup=2, on_error=note)
    assert out["a"]["total"].samples == (3.0, 4.0, 5.0)
    assert out["a"]["total"].unit == "ms"
    assert "b" not in out
    assert failed == {"b": "too large"}
    assert log.count("b") == 3
    with pytest.raises(torch.OutOfMemoryError):
        interleave({"b": lambda: cell("b", 1)}, repeats=1, warmup=0)
    with pytest.raises(OptionError, match="repeats=0"):
        interleave({}, repeats=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_stage_times_add_up_and_land_in_their_stage(family: str) -> None:
    tiny = build(family)
    inputs = tiny.inputs([["What is on ", ("image", picture(60, 40)), "?"]])
    stages = find_stages(tiny.model)
    slow = {"vision": stages.vision, "projector": stages.projectors[0], "prefill": stages.language}

    def run() -> StageClock:
        clock = StageClock("cpu")
        with torch.no_grad(), clock.watch(stages):
            tiny.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return clock

    run()
    clock = run()
    plain = clock.times()
    assert clock.steps == 3
    parts = sum(plain[name] for name in STAGES)
    assert parts == pytest.approx(plain["total"], rel=0.1)
    assert plain["ttft"] == pytest.approx(sum(plain[n] for n in STAGES if n != "decode"), rel=1e-6)
    assert plain["decode_tokens_per_s"] == pytest.approx(2000 / plain["decode"])
    for name, module in slow.items():
        handle = module.register_forward_pre_hook(lambda m, a: time.sleep(0.1))
        try:
            times = run().times()
        finally:
            handle.remove()
        assert times[name] > 100 > plain[name]
        others = [n for n in STAGES if n not in (name, "decode")]
        assert all(times[n] < 90 for n in others)
