"""The HTML page of a profile: findings, sortable numbers, pictures; tests/browser opens one for real."""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from tokprune.errors import install_line
from tokprune.profiling import tables
from tokprune.profiling.arithmetic import arithmetic
from tokprune.profiling.pages import arithmetic_page, profile_page
from tokprune.profiling.presets import preset
from tokprune.profiling.published import comparison
from tokprune.profiling.report import ProfileReport, RunResult
from tokprune.profiling.timing import Measurement
from tokprune.viz.html import PagePicture, Value, render

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def report() -> ProfileReport:
    """Made-up cells: what pages are tested with, here and in the browser."""

    def cell(name: str, kind: str, ratio: float | None, visual: int, factor: float) -> RunResult:
        parts = {
            "vision": 30.0,
            "projector": 1.0,
            "select": 2.0,
            "prefill": 60.0 * factor,
            "decode": 50.0,
            "other": 1.0,
        }
        total = sum(parts.values())
        times = {n: Measurement(n, "ms", (v, v, 1.1 * v)) for n, v in parts.items()}
        times["ttft"] = Measurement("ttft", "ms", (total - 51,) * 3)
        times["total"] = Measurement("total", "ms", (total * 1.02,) * 3)
        times["decode_tokens_per_s"] = Measurement("d", "tokens/s", (20.0, 21.0, 22.0))
        flops = {
            "vision": 4e11,
            "projector": 1e10,
            "select": 1e8 if kind == "pruned" else 0,
            "prefill": 8e12 * factor,
            "decode": 1e10,
        }
        cached = [visual + 64] * 4
        return RunResult(
            name, kind, times, visual, 576, visual + 64, name.split()[0], ratio, {k: int(v) for k, v in flops.items()},
            {"gated": int(4e12 * factor)}, 1000 * (visual + 64), 1000 * (visual + 64), 15 * 2**30,
            tokens={"projector": 576, "llm": visual, "prompt": visual + 64, "cached": cached},
        )  # fmt: skip

    cells = (
        cell("plain", "plain", None, 576, 1.0),
        cell("divprune 0.1", "pruned", 0.1, 58, 0.15),
        cell("ideal 0.1", "ideal", 0.1, 58, 0.12),
        cell("resized 0.1", "resized", 0.1, 60, 0.13),
    )
    known = preset("llava-1.5-7b")
    environment = {"torch": "2", "device_name": "a <made-up> device", "dtype": "bfloat16", "repeats": 3}
    return ProfileReport(
        "llava <7b>", cells, 4, 1, environment, 7_000_000_000, 14 * 10**9, 10**9, {"hired 0.1": "out of memory on "
        "cuda"},
        ("a note",), tuple(comparison(known.published, known.decoder)), "tokprune profile --model 'x y' --html r.html",
    )  # fmt: skip


def test_the_page_holds_every_number_once_asked_for() -> None:
    made = profile_page(report(), [PagePicture(Image.new("RGB", (4, 4)), "kept", "kept")])
    assert [s.title for s in made.sections] == [
        "Findings",
        "Time",
        "Tokens, FLOPs and memory",
        "What others report",
        "What was kept",
    ]
    text = render(made)
    for words in (
        "divprune 0.1: first token",
        "hired 0.1 failed: out of memory",
        "a note",
        "PyramidDrop",
        "58 (10.1 %)",
    ):
        assert words in text
    assert text.count("data:image/png") == 3  # two plots and the picture
    assert "<made-up>" not in text


def test_times_and_costs_are_the_report_s() -> None:
    times = tables.time_table(report())
    heads = [f"{c} {u}".strip() for c, u in zip(times.columns, times.units, strict=True)]
    row = dict(zip(heads, times.rows[1], strict=True))
    assert row["vision ms"] == Value("31.0 ± 0.8", 31.0)
    assert row["ideal faster"].sort == pytest.approx(report().speedup(report().cell("ideal 0.1")))
    assert times.rows[0][heads.index("total faster")] is None
    assert "within 2 %" in times.caption
    costs = tables.cost_table(report())
    row = dict(
        zip([f"{c} {u}".strip() for c, u in zip(costs.columns, costs.units, strict=True)], costs.rows[1], strict=True)
    )
    assert row["prompt tokens"] == 122
    assert row["all FLOPs"].sort == report().cell("divprune 0.1").flops_total(4)
    assert row["KV cache"].sort == 122_000


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    made = profile_page(report())
    assert not made.sections[1].pictures
    assert install_line("plot") in made.sections[1].text


def test_a_profile_whose_plain_run_failed_still_makes_a_page() -> None:
    made = replace(report(), cells=report().cells[1:], failed={"plain": "out of memory on cuda"})
    text = render(profile_page(made))
    assert "plain failed: out of memory" in text


def test_noise_is_said() -> None:
    assert report().warning == ""
    cell = report().plain
    loud = replace(cell, times=cell.times | {"total": Measurement("total", "ms", (100.0, 150.0, 50.0))})
    made = replace(report(), cells=(loud,))
    assert 0.1 < made.noise < 0.4
    assert "raise --repeats" in made.warning
    assert "raise --repeats" in render(profile_page(made))


def test_arithmetic_page() -> None:
    made = arithmetic(preset("smolvlm-256m"), [0.1], new_tokens=4)
    page = arithmetic_page(made, "tokprune profile --preset smolvlm-256m --flops-only", {"torch": "2"})
    text = render(page)
    assert "SmolVLM" in text
    assert "Sources" in text
    assert "decode step" in text
