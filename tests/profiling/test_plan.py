"""Roofline plans: arithmetic by hand, monotone searches, advice for the typical cases."""

from __future__ import annotations

import json

import pytest
import torch

from tokprune.errors import OptionError
from tokprune.profiling import formulas
from tokprune.profiling.build import build_meta, vision_calls
from tokprune.profiling.devices import Device, calibrate, device
from tokprune.profiling.loaded import preset_of_report
from tokprune.profiling.plan import CostModel, Workload, larger, plan
from tokprune.profiling.presets import preset
from tokprune.profiling.profile import profile
from tokprune.testing import build, picture

TOWER = (0.4e12, 0.3e9)  # FLOPs and parameters by hand: no test but one needs the meta device
TOWERS = dict.fromkeys(["llava-1.5-7b", "llava-1.5-13b"], TOWER)
PLAIN = Device("test", 100e12, 1e12, 40e9, 1.0, 1.0)


def costs(name: str = "llava-1.5-7b", place: Device = PLAIN, **work: int) -> CostModel:
    return CostModel(preset(name), place, Workload((336, 336), **work), vision=TOWER)  # type: ignore[arg-type]


def test_estimate_by_hand() -> None:
    model = costs(text=64, new_tokens=3)
    e = model.at(576)
    shape = model.shape
    weights = 2 * preset("llava-1.5-7b").parameters - 2 * 0.3e9
    cache = 2 * 32 * 640 * 4096 * 2
    assert e.vision == pytest.approx(0.4e12 / 100e12)
    assert e.prefill == pytest.approx(formulas.exact_prefill(shape, 640) / 100e12)
    grown = 2 * 32 * 3 * 4096 * 2
    assert e.decode == pytest.approx(2 * (weights + cache + grown / 2) / 1e12)
    assert e.ttft == e.vision + e.prefill
    assert e.bound == "prefill"


@pytest.mark.parametrize("target", ["ttft", "total", "memory"])
def test_the_largest_count_that_fits_is_found(target: str) -> None:
    model = costs()
    limit = getattr(model.at(200), target)
    found = model.most(target, limit)  # type: ignore[arg-type]
    assert found is not None
    assert getattr(model.at(found), target) <= limit
    assert found == 576 or getattr(model.at(found + 1), target) > limit
    assert found >= 200
    assert model.most(target, 1e-9) is None  # type: ignore[arg-type]
    assert model.most(target, 1e12) == 576  # type: ignore[arg-type]


def test_decoder_stage_pays_its_complete_layers() -> None:
    model = costs()
    early, late = model.at(58, full_layers=2), model.at(58, full_layers=16)
    assert model.at(58).prefill < early.prefill < late.prefill < model.at(576).prefill
    assert model.at(58, full_layers=32).prefill == model.at(576).prefill


def test_pruning_stops_paying_where_halving_gains_little() -> None:
    model = costs(new_tokens=1)
    stop = model.stops_paying(0.05)
    assert stop.visual < 576
    assert model.at(stop.visual // 2).total > 0.95 * stop.total
    assert costs(new_tokens=500).stops_paying(0.05).visual == 576  # decoding dominates: not worth it


def test_plans_speak_plainly() -> None:
    made = plan(
        preset("llava-1.5-7b"), device("RTX4090"), Workload((336, 336)), "ttft", 0.06, compare=False, vision=TOWERS
    )
    text = "\n".join(made.advice)
    assert made.connector is not None
    assert made.decoder is not None
    assert made.decoder < made.connector < 576
    assert f"ratio {made.connector / 576:.3g}" in text
    assert "decode, which it does not shorten" in text
    data = json.loads(json.dumps(made.to_dict()))
    assert (data["type"], data["version"]) == ("tokprune.Plan", 1)
    hopeless = plan(
        preset("llava-1.5-7b"), device("t4"), Workload((336, 336)), "ttft", 0.001, compare=False, vision=TOWERS
    )
    assert hopeless.connector is None
    assert any("no ratio reaches" in line for line in hopeless.advice)
    tight = plan(preset("llava-1.5-13b"), device("t4"), Workload((336, 336)), compare=False, vision=TOWERS)
    assert any("more memory than t4" in line for line in tight.advice)


def test_a_larger_model_with_fewer_tokens_at_equal_cost() -> None:
    place = Device("compute bound", 10e12, 100e12, 1e15, 1.0, 1.0)
    made = plan(preset("llava-1.5-7b"), place, Workload((336, 336), new_tokens=1), vision=TOWERS)
    (other,) = made.alternatives
    assert other.preset == "llava-1.5-13b"
    assert other.visual is not None
    assert 1 <= other.visual < 576
    assert other.estimate is not None
    assert other.estimate.total <= made.full.total
    assert [p.name for p in larger(preset("qwen2.5-vl-3b"))] == ["qwen2.5-vl-7b", "qwen2.5-vl-72b"]
    assert larger(preset("gemma3-4b")) == []


def test_a_measured_profile_calibrates() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a", ("image", picture(40, 40)), "b"]])
    report = profile(tiny.model, inputs, [], [], new_tokens=3, repeats=2, warmup=1)
    found = calibrate(report)
    cell = report.plain
    assert found.seconds(cell.flops["prefill"], 0) * 1000 == pytest.approx(cell.times["prefill"].median)
    step = found.seconds(0, report.weight_bytes - report.vision_bytes + (cell.cache_bytes or 0))
    assert 1 / step == pytest.approx(cell.times["decode_tokens_per_s"].median)
    known, vision = preset_of_report(report)
    towers = {known.name: vision}
    text = cell.prompt - cell.visual
    work = Workload((40, 40), text=text, new_tokens=3)
    made = plan(known, found, work, "total", 1.0, vision=towers, dtype=torch.float32)
    assert made.full.decode * 1000 == pytest.approx(2000 / cell.times["decode_tokens_per_s"].median, rel=0.05)
    assert made.full.prefill * 1000 >= 0.999 * cell.times["prefill"].median
    assert made.connector == cell.visual_full == 64
    assert towers[known.name][0] == cell.flops["vision"] + cell.flops["projector"]
    bare = profile(tiny.model, inputs, [], [], new_tokens=2, repeats=1, warmup=0, count_flops=False)
    with pytest.raises(OptionError, match="count_flops"):
        calibrate(bare)


def test_the_tower_is_counted_where_nobody_gives_it() -> None:
    found = CostModel(preset("smolvlm-256m"), PLAIN, Workload((512, 512)))
    assert found.vision_flops == pytest.approx(sum(vision_calls(build_meta(found.preset), found.preset, (512, 512))))
    assert found.vision_bytes == pytest.approx(2 * 93.5e6, rel=0.02)  # SigLIP base and the connector
    assert found.llm_bytes + found.vision_bytes == pytest.approx(2 * found.preset.parameters)


def test_wrong_input_and_lists() -> None:
    with pytest.raises(OptionError, match="Did you mean 'h100'"):
        device("h1oo")
    with pytest.raises(OptionError, match="give both"):
        plan(preset("llava-1.5-7b"), PLAIN, target="ttft")
    with pytest.raises(OptionError, match="unknown target"):
        plan(preset("llava-1.5-7b"), PLAIN, target="speed", limit=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("new_tokens", [1, 64, 500])
def test_advice_names_the_bound_and_promises_no_more_than_it_leaves(new_tokens: int) -> None:
    """Where decoding is the longest part, pruning is not said to pay without that."""
    made = plan(preset("llava-next-7b"), device("a100"), Workload((672, 672), new_tokens=new_tokens), compare=False)
    last = made.advice[-1]
    if made.full.bound == "prefill":
        assert last.startswith("pruning pays")
    else:
        assert made.full.bound == "decode"
        assert "pays down" not in last
        assert "decode" in last
    assert (made.full.bound == "prefill") is (new_tokens == 1)
