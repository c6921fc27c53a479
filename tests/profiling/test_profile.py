"""A profile of tiny models: cells, arithmetic, JSON, the table, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import tokprune
from tokprune.budget import kept
from tokprune.errors import BudgetError, OptionError, raised_here
from tokprune.methods.connector.uniform import Uniform
from tokprune.profiling import formulas
from tokprune.profiling.profile import profile, visual_columns
from tokprune.profiling.report import ProfileReport
from tokprune.profiling.resize import scaled_picture, shrinking
from tokprune.profiling.runs import Profiler, ProfileRun, is_out_of_memory
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
    assert again.config["model_type"] == "llava"
    assert "_name_or_path" not in file.read_text(encoding="utf-8")
    with pytest.raises(OptionError, match="version 7"):
        ProfileReport.from_dict(report.to_dict() | {"version": 7})
    with pytest.raises(OptionError, match="not a profile"):
        ProfileReport.from_dict({})
    with pytest.raises(OptionError, match="no cell 'fast'"):
        report.cell("fast")


def test_the_table_shows_units_and_leaves_out_what_is_unknown(report: ProfileReport) -> None:
    def shown(width: int, what: ProfileReport = report) -> str:
        console = Console(width=width)
        with console.capture() as captured:
            console.print(what.table(width))
        return captured.get()

    text = shown(200)
    for word in ("prefill", "ms", "tokens/s", "KV cache", "6 (9.38 %)", "FLOPs", "ideal", "peak memory", "±"):
        assert word in text
    assert "±" not in shown(80).split("Medians")[0]  # a narrow terminal holds the medians
    bare = replace(report, cells=tuple(replace(c, flops={}, peak_bytes=None) for c in report.cells))
    assert "peak memory" not in shown(200, bare).split("FLOPs are counted")[0]


def test_findings_set_each_speed_up_beside_its_ideal(report: ProfileReport) -> None:
    lines = report.findings(0.1)
    assert [line.split(":")[0] for line in lines] == ["divprune 0.1", "random 0.1"]
    ideal = report.speedup(report.cell("ideal 0.1"))
    assert all(f"(ideal {ideal:.2f} x)" in line for line in lines)
    assert len(report.findings()) == 4


def test_tokens_of_every_stage(report: ProfileReport) -> None:
    assert report.plain.tokens == {"projector": 64, "llm": 64, "prompt": 74, "cached": [74 + NEW - 1] * 2}
    assert report.cell("divprune 0.1").tokens == {"projector": 64, "llm": 6, "prompt": 16, "cached": [16 + NEW - 1] * 2}


def test_pruning_lowers_the_peak_of_live_bytes(report: ProfileReport) -> None:
    weights = report.weight_bytes
    plain, pruned = report.plain.peak_bytes, report.cell("random 0.1").peak_bytes
    assert plain is not None
    assert pruned is not None
    assert weights < pruned < plain
    saved = report.plain.cache_bytes - report.cell("random 0.1").cache_bytes  # type: ignore[operator]
    assert plain - pruned >= saved


def test_at_ratio_1_only_noise_differs(report: ProfileReport) -> None:
    for name in ("divprune 1", "random 1"):
        cell = report.cell(name)
        assert (cell.visual, cell.prompt, cell.tokens) == (64, 74, report.plain.tokens)
        assert {k: v for k, v in cell.flops.items() if k != "operators"} == {
            k: v for k, v in report.plain.flops.items() if k != "operators"
        }
        assert cell.cache_bytes == report.plain.cache_bytes


def test_resizing_is_a_rival_where_the_processor_allows() -> None:
    tiny = build("qwen2_5_vl")
    image = picture(64, 64)

    def prepare(im: Any) -> Any:
        return tiny.inputs([["What is ", ("image", im), "?"]])

    def count(inputs: Any) -> int:
        return visual_columns(tiny.model, inputs)

    rival = shrinking(lambda factor: prepare(scaled_picture(image, factor)), count)
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
    rival = shrinking(
        lambda factor: llava.inputs([["a", ("image", scaled_picture(picture(40, 40), factor))]]),
        lambda x: visual_columns(llava.model, x),
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


def test_the_plain_run_out_of_memory_leaves_the_others(llava: TinyVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Profiler.once

    def full(self: Profiler, run: ProfileRun) -> dict[str, float]:
        if run.kind == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return once(self, run)

    monkeypatch.setattr(Profiler, "once", full)
    made = profile(llava.model, prompt(llava), ["random"], [0.5], new_tokens=2, repeats=1, warmup=0, count_flops=False)
    assert [c.name for c in made.cells] == ["random 0.5", "ideal 0.5"]
    assert "out of memory" in made.failed["plain"]
    assert made.speedup(made.cells[0]) is None
    assert made.findings() == []
    console = Console(width=160)
    with console.capture() as shown:
        console.print(made.table())
    assert "random 0.5" in shown.get()
    with pytest.raises(OptionError, match="It failed: out of memory"):
        _ = made.plain


def test_a_method_that_cannot_work_here_is_named_and_left_out(llava: TinyVLM) -> None:
    cannot = tokprune.get_method("hired", init_layer=99)  # the tower has no such block
    made = profile(
        llava.model, prompt(llava), [cannot, "random"], [0.5], new_tokens=2, repeats=1, warmup=0, ideal=False
    )
    assert [c.name for c in made.cells] == ["plain", "random 0.5"]
    assert "99" in made.failed["hired 0.5"]


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_what_was_kept_is_told(llava: TinyVLM) -> None:
    told: dict[str, Any] = {}
    profile(
        llava.model,
        prompt(llava),
        ["random"],
        [0.25],
        new_tokens=2,
        repeats=1,
        warmup=0,
        ideal=False,
        on_pruned=told.__setitem__,
    )
    assert list(told) == ["random 0.25"]
    assert told["random 0.25"].streams[0].kept == 16


def test_only_the_model_s_own_refusal_of_embeddings_is_noted(llava: TinyVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours on the way there is an error like any other."""
    few: Any = {"new_tokens": 2, "repeats": 1, "warmup": 0, "count_flops": False}
    plain = llava.model.generate

    def refuses(*args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if inputs_embeds is not None:
            raise ValueError("this model needs its pixels")
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(llava.model, "generate", refuses)
        made = profile(llava.model, prompt(llava), ["uniform"], [0.5], **few)
    assert [c.name for c in made.cells] == ["plain", "uniform 0.5"]
    assert any("ideal 0.5: not measured" in note and "needs its pixels" in note for note in made.notes)
    monkeypatch.setattr(Profiler, "ideal", lambda self, source, name: source.nothing)
    with pytest.raises(AttributeError):
        profile(llava.model, prompt(llava), ["uniform"], [0.5], **few)


def test_whose_mistake_an_error_is() -> None:
    for call, ours in ((lambda: kept(None, 0.5), True), (lambda: torch.zeros(2, 3) @ torch.zeros(2), False)):  # type: ignore[arg-type]
        with pytest.raises((TypeError, RuntimeError)) as caught:
            call()
        assert raised_here(caught.value) is ours


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
