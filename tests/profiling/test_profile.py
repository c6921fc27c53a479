"""A profile of tiny models: cells, arithmetic, JSON, the table, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tokprune
from tokprune.errors import BudgetError, OptionError
from tokprune.methods.connector.uniform import Uniform
from tokprune.profiling import formulas
from tokprune.profiling.profile import profile, visual_columns
from tokprune.profiling.report import ProfileReport
from tokprune.profiling.resize import smaller
from tokprune.profiling.stages import STAGES
from tokprune.testing import TinyVLM, build, picture
from tokprune.tokens import Selection, VisualTokens

NEW = 3


def prompt(tiny: TinyVLM, width: int = 60, height: int = 40) -> Any:
    return tiny.inputs([["What is ", ("image", picture(width, height)), "?"]])


@pytest.fixture(scope="module")
def llava() -> TinyVLM:
    return build("llava")


@pytest.fixture(scope="module")
def report(llava: TinyVLM) -> ProfileReport:
    return profile(llava.model, prompt(llava), ["divprune", "random"], [1.0, 0.1], new_tokens=NEW, repeats=3, warmup=1)


def test_every_cell_is_there_with_its_token_counts(report: ProfileReport) -> None:
    names = [c.name for c in report.cells]
    assert names == ["plain", "divprune 1", "random 1", "divprune 0.1", "random 0.1", "ideal 1", "ideal 0.1"]
    assert report.plain.visual == report.plain.visual_full == 64
    assert [report.cell(n).visual for n in ("divprune 0.1", "ideal 0.1", "divprune 1")] == [6, 6, 64]
    assert report.plain.prompt - report.cell("divprune 0.1").prompt == 58


def test_cache_bytes_are_what_arithmetic_says(report: ProfileReport) -> None:
    per_token = 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, head size, float32
    for cell in report.cells:
        assert cell.cache_bytes == cell.cache_expected == per_token * (cell.prompt + NEW - 1)


def test_flops_are_exact_and_the_ideal_has_no_selection(report: ProfileReport, llava: TinyVLM) -> None:
    shape = formulas.DecoderShape.of(llava.model.config)
    for cell in report.cells:
        assert cell.flops["prefill"] == formulas.exact_prefill(shape, cell.prompt)
        assert cell.flops["decode"] == formulas.exact_decode(shape, cell.prompt)
        assert cell.flops["vision"] == report.plain.flops["vision"]
    assert report.cell("divprune 0.1").flops["select"] > 0
    assert report.cell("ideal 0.1").flops["select"] == 0
    assert report.plain.flops_total(3) - report.plain.flops_total(1) == 2 * report.plain.flops["decode"]


def test_parts_add_up_and_ratio_1_is_the_plain_run(report: ProfileReport) -> None:
    for cell in report.cells:
        for i, total in enumerate(cell.times["total"].samples):
            parts = sum(cell.times[name].samples[i] for name in STAGES)
            assert parts == pytest.approx(total, rel=0.1)
    assert report.cell("random 1").flops | {"operators": None} == report.plain.flops | {"operators": None}
    assert report.speedup(report.plain) == 1.0


def test_the_model_is_given_back_unpruned(report: ProfileReport, llava: TinyVLM) -> None:
    assert not [k for k in llava.model.__dict__ if "tokprune" in k]
    assert "get_image_features" not in llava.model.base_model.__dict__


def test_json_round_trip_and_refusals(report: ProfileReport, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    report.save(file)
    again = ProfileReport.load(file)
    assert again.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert again.cell("divprune 0.1").times["ttft"].unit == "ms"
    assert again.environment["dtype"] == "float32"
    with pytest.raises(OptionError, match="version 7"):
        ProfileReport.from_dict(report.to_dict() | {"version": 7})
    with pytest.raises(OptionError, match="not a profile"):
        ProfileReport.from_dict({})
    with pytest.raises(OptionError, match="no cell 'fast'"):
        report.cell("fast")


def test_the_table_shows_units_and_leaves_out_what_is_unknown(report: ProfileReport) -> None:
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    for word in ("prefill ms", "decode tok/s", "KV cache", "6 (9.38 %)", "FLOPs", "ideal"):
        assert word in text
    assert "peak" not in text


def test_resizing_is_a_rival_where_the_processor_allows() -> None:
    tiny = build("qwen2_5_vl")
    image = picture(64, 64)

    def prepare(im: Any) -> Any:
        return tiny.inputs([["What is ", ("image", im), "?"]])

    def count(inputs: Any) -> int:
        return visual_columns(tiny.model, inputs)

    rival = smaller(prepare, image, count)
    full = count(prepare(image))
    assert full == 64
    assert abs(count(rival(0.25)) - 16) <= 2
    made = profile(
        tiny.model, prepare(image), ["uniform"], [0.25], new_tokens=2, repeats=1, warmup=0, resized=rival, ideal=False
    )
    cell = made.cell("resized 0.25")
    assert cell.flops["vision"] < 0.5 * made.plain.flops["vision"]
    assert cell.visual == count(rival(0.25))


def test_a_fixed_processor_is_noted(llava: TinyVLM) -> None:
    rival = smaller(
        lambda im: llava.inputs([["a", ("image", im)]]), picture(40, 40), lambda x: visual_columns(llava.model, x)
    )
    made = profile(
        llava.model,
        prompt(llava),
        ["uniform"],
        [0.5],
        new_tokens=2,
        repeats=1,
        warmup=0,
        resized=rival,
        count_flops=False,
    )
    assert any("picture of any size" in note for note in made.notes)
    assert "resized 0.5" not in [c.name for c in made.cells]


class Greedy(Uniform):
    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_names_the_cell_and_goes_on(llava: TinyVLM) -> None:
    made = profile(
        llava.model,
        prompt(llava),
        [Greedy(), "random"],
        [0.5],
        new_tokens=2,
        repeats=1,
        warmup=0,
        ideal=False,
        count_flops=False,
    )
    assert [c.name for c in made.cells] == ["plain", "random 0.5"]
    assert "out of memory" in made.failed["uniform 0.5"]


def test_batches_and_methods_that_print_alike(llava: TinyVLM) -> None:
    two = llava.inputs([["a ", ("image", picture(40, 40)), "?"], ["abcdef ", ("image", picture(60, 40)), "?"]])
    made = profile(llava.model, two, [Uniform(), Uniform()], [0.25], new_tokens=3, repeats=1, warmup=0)
    assert [c.name for c in made.cells] == ["plain", "uniform 0.25", "uniform 0.25 #2", "ideal 0.25"]
    assert made.batch == 2
    for cell in made.cells:
        decoded = 2 * 2 * 1000 / cell.times["decode"].median  # two steps, two prompts
        assert cell.times["decode_tokens_per_s"].median == pytest.approx(decoded)
        assert cell.cache_bytes == cell.cache_expected


def test_wrong_input(llava: TinyVLM) -> None:
    with pytest.raises(OptionError, match="at least 2"):
        profile(llava.model, prompt(llava), new_tokens=1)
    with pytest.raises(BudgetError, match="ratio=10"):
        profile(llava.model, prompt(llava), ratios=[10])
    with pytest.raises(OptionError, match="divprune"):
        profile(llava.model, prompt(llava), ["divprun"], [0.5], new_tokens=2)
    assert tokprune.apply(llava.model, "random", ratio=0.5).remove() is None
