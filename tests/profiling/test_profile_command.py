"""`tokprune profile`, `plan`, `plots` and `heatmap` as typed: refusals, arithmetic, and (slow) the embedded model in
full."""

from __future__ import annotations

import builtins
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.profiling.test_pages import report
from tokprune.cli.app import app
from tokprune.errors import MissingExtraError, TokpruneError
from tokprune.profiling.presets import Preset, preset
from tokprune.profiling.report import ProfileReport
from tokprune.testing import build

run = CliRunner().invoke
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["profile", "--preset", "llava-1.5-7B-hf", "--flops-only"], "'llava-1.5-7b'"),
        (["profile", "--preset", "qwen2.5-vl-8b", "--flops-only"], "Did you mean 'qwen2.5-vl"),
        (["profile", "--preset", "llava-1.5-7b"], "--random-weights"),
        (["profile", "--random-weights"], "--preset llava-1.5-7b --random-weights"),
        (["profile", "--flops-only", "--tokens", "9"], "give --image"),
        (["profile", "--preset", "llava-1.5-7b", "--flops-only", "--random-weights"], "give one of them"),
        (["profile", "--preset", "llava-1.5-7b", "--flops-only", "--plots", "x"], "measured times"),
        (["profile", "--methods", "divprun"], "divprune"),
        (["profile", "--methods", "random+divprun"], "divprune"),
        (["profile", "--dtype", "bf17"], "'bf16'"),
        (["profile", "--device", "cudo"], "cuda"),
        (["profile", "--attn", "flash"], "flash_attention_2"),
        (["profile", "--image", "missing.png"], "missing.png"),
        (["profile", "--video", "missing.mp4"], "missing.mp4"),
        (["profile", "--image", "a.png", "--video", "b.mp4"], "one of them"),
        (["profile", "--batch", "0"], "--batch 0"),
        (["profile", "--repeats", "0"], "--repeats 0"),
        (["profile", "--ratios", "ten"], "--ratios 0.5"),
        (["plan", "--preset", "llava-1.5-7b"], "--gpu"),
        (["plan", "--gpu", "a100"], "--preset"),
        (["plan", "--gpu", "a101", "--preset", "llava-1.5-7b"], "'a100'"),
        (["plan", "--preset", "llava-1.5-7b", "--model", "x", "--gpu", "a100"], "one of them"),
        (["plan", "--profile", "missing.json"], "missing.json"),
        (["plots", "missing.json"], "missing.json"),
        (["heatmap", "--image", "missing.png"], "--signals cls_attention"),
        (["heatmap", "--image", "missing.png", "--signals", "cls_attention"], "missing.png"),
    ],
)
def test_wrong_input_says_what_to_type(arguments: list[str], words: str) -> None:
    result = run(app, arguments)
    assert isinstance(result.exception, TokpruneError), result.output
    assert words in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("more", [["--model", "demo"], ["--preset", "smolvlm-256m", "--random-weights"]])
def test_no_gpu_is_said_before_anything_is_loaded(more: list[str]) -> None:
    result = run(app, ["profile", "--device", "cuda", *more])
    assert "sees no GPU; use cpu (--device cpu" in str(result.exception)


def test_unreadable_media_are_named(tmp_path: Path) -> None:
    for option, name in (("--image", "broken.png"), ("--video", "broken.mp4")):
        file = tmp_path / name
        file.write_bytes(b"not what its name says")
        result = run(app, ["profile", option, str(file)])
        assert isinstance(result.exception, TokpruneError)
        assert name in str(result.exception)


def test_missing_extras_are_said_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("jinja2", "matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for option in ("--html", "--plots"):
        result = run(app, ["profile", option, "out"])
        assert isinstance(result.exception, MissingExtraError)


def test_weights_that_do_not_fit_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OOM

    monkeypatch.setattr("tokprune.cli.profile_inputs.build_random", full)
    result = run(app, ["profile", "--preset", "smolvlm-256m", "--random-weights"])
    assert "smolvlm-256m needs" in str(result.exception)
    assert "MiB" in str(result.exception)


def test_arithmetic_of_a_preset(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    file, page = tmp_path / "a.json", tmp_path / "a.html"
    arguments = [
        "profile",
        "--preset",
        "smolvlm-256m",
        "--flops-only",
        "--ratio",
        "0.1",
        "--new-tokens",
        "8",
        "--tokens",
        "800",
    ]
    result = run(app, [*arguments, "--json", str(file), "--html", str(page)])
    assert result.exception is None, result.exception
    data = json.loads(file.read_text(encoding="utf-8"))
    assert [row["ratio"] for row in data["rows"]] == [1.0, 0.1]
    assert f"{data['rows'][0]['visual']} visual tokens" in result.output
    assert "KV cache" in result.output
    assert "SmolVLM" in page.read_text(encoding="utf-8")


def test_arithmetic_of_a_model_s_config(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    result = run(app, ["profile", "--model", "demo", "--flops-only", "--ratio", "0.1", "--json", str(out)])
    assert result.exception is None, result.exception
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [row["visual"] for row in data["rows"]] == [256, 26]
    assert data["rows"][0]["vision"] == pytest.approx(704e6, rel=0.02)
    assert "by its config and processor alone" in result.output


def test_plots_of_a_profile_and_of_a_demo(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    profiled, demo = tmp_path / "p.json", tmp_path / "d.json"
    report().save(profiled)
    cells = [
        {"method": m, "ratio": r, "accuracy": a, "prefill_ms": c, "flops": c * 1e6}
        for m, r, a, c in (
            ("none", 1.0, 0.9, 9),
            ("random", 0.5, 0.8, 5),
            ("random", 0.1, 0.5, 2),
            ("divprune", 0.1, 0.7, 2),
        )
    ]
    demo.write_text(json.dumps({"type": "tokprune.demo", "version": 1, "cells": cells}))
    for file, names in (
        (profiled, {"latency.png", "ttft.png"}),
        (demo, {"accuracy.png", "pareto_prefill.png", "pareto_flops.png"}),
    ):
        out = tmp_path / f"{file.stem}_plots"
        result = run(app, ["plots", str(file), "-o", str(out)])
        assert result.exception is None, result.exception
        assert {path.name for path in out.iterdir()} == names
        assert all(Image.open(path).width > 600 for path in out.iterdir())
    demo.write_text("{}")
    assert "tokprune profile --json" in str(run(app, ["plots", str(demo)]).exception)


def test_plots_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from tokprune.evaluation.table import Row

    rows = [
        Row("pope", "none", 1.0, "f1", 86.0, True, 90, ttft_ms=30.0),
        Row("pope", "random", 0.1, "f1", 70.0, True, 90, ttft_ms=12.0),
        Row("pope", "divprune", 0.1, "f1", 80.0, True, 90, ttft_ms=13.0),
        Row("gqa", "none", 1.0, "exact_match", 60.0, True, 90),
        Row("gqa", "random", 0.1, "exact_match", float("nan"), True, 0, note="failed"),
    ]
    monkeypatch.setattr("tokprune.evaluation.results.load", lambda path: path)
    monkeypatch.setattr("tokprune.evaluation.table.rows_of", lambda sweep: rows)
    file = tmp_path / "results.json"
    file.write_text('{"type": "tokprune.eval"}')
    result = run(app, ["plots", str(file), "-o", str(tmp_path / "out")])
    assert result.exception is None, result.exception
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pope_ratio.png", "pope_ttft.png"}


def test_plots_of_a_sweep_carry_its_intervals() -> None:
    """What `tokprune plots` draws of results.json are the figures that `tokprune eval --plots` draws."""
    pytest.importorskip("matplotlib")
    from tokprune.evaluation import report as drawing
    from tokprune.evaluation.significance import compare
    from tokprune.evaluation.table import Row

    paired = compare({i: float(i % 10 > 0) for i in range(90)}, {i: float(i % 10 > 2) for i in range(90)})
    row = Row("pope", "divprune", 0.1, "f1", 70.0, True, 90, paired=paired)
    axes = drawing.figures([Row("pope", "none", 1.0, "f1", 90.0, True, 90), row])[0].figure.axes[0]
    (interval,) = [c.get_segments()[0][:, 1] for c in axes.collections]
    low, high = 90 + 100 * paired.low, 90 + 100 * paired.high
    assert interval.tolist() == pytest.approx([low, high])
    assert low < 70 < high


def test_a_plan_from_a_measured_profile(tmp_path: Path) -> None:
    """The model is the profile's, and so are the device, the text and the picture."""
    from tokprune.profiling.build import config_of

    config = config_of(preset("llava-1.5-7b")).to_dict()
    environment = report().environment | {"device_name": "measured device"}
    file, out = tmp_path / "p.json", tmp_path / "plan.json"
    replace(report(), config=config, environment=environment).save(file)
    result = run(app, ["plan", "--profile", str(file), "--target", "ttft", "--limit", "0.06", "--json", str(out)])
    assert result.exception is None, result.exception
    assert "measured device (measured)" in result.output
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["workload"]["text"] == 64
    assert data["full"]["visual"] == 576
    assert data["full"]["prefill"] == pytest.approx(0.060, rel=0.1)  # what the made-up profile measured
    bare = tmp_path / "bare.json"
    report().save(bare)
    assert "no config" in str(run(app, ["plan", "--profile", str(bare)]).exception)


def test_a_plan_from_a_model_s_config_alone(tmp_path: Path) -> None:
    """The demo's config and processor: as many tokens, parameters and FLOPs as a profile of it counts."""
    from tokprune.demo.loading import WEIGHTS
    from tokprune.profiling.loaded import preset_of_folder

    known, (vision, parameters) = preset_of_folder("demo", WEIGHTS)
    assert known.tokens((768, 1024)) == 256
    assert 1_500_000 < known.parameters < 3_000_000
    assert 0 < parameters < known.parameters
    assert vision == pytest.approx(704e6, rel=0.02)
    assert "cannot read --model" in str(run(app, ["plan", "--model", str(tmp_path), "--gpu", "t4"]).exception)


def spent(arguments: Sequence[str]) -> float:
    """CPU seconds of a command in a process of its own, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tokprune", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_the_demo_model_in_full(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    json_file, page, plots = tmp_path / "p.json", tmp_path / "p.html", tmp_path / "plots"
    methods = ["--methods", "divprune,hired", "--ratios", "1,0.1"]
    files = ["--json", str(json_file), "--html", str(page), "--plots", str(plots)]
    assert spent(["profile", "--model", "demo", *methods, *files]) < 60
    made = ProfileReport.load(json_file)
    assert [c.name for c in made.cells][:3] == ["plain", "divprune 1", "hired 1"]
    for cell in made.cells:
        assert abs(cell.remainder) < 0.1
        assert cell.cache_bytes == cell.cache_expected
        assert len(cell.times["total"].samples) == 5
    # What pruning costs at ratio 1 is bookkeeping of a few ms: the LLM's own work differs by noise only.
    plain = made.plain
    for name in ("divprune 1", "hired 1"):
        cell = made.cell(name)
        assert (cell.visual, cell.prompt) == (plain.visual, plain.prompt)
        assert cell.flops["prefill"] == plain.flops["prefill"]
        ratios = [a / b for a, b in zip(cell.times["prefill"].samples, plain.times["prefill"].samples, strict=True)]
        assert 0.5 < sorted(ratios)[2] < 2.0
    assert made.command.startswith("tokprune profile") or "profile" in made.command
    assert {path.name for path in plots.iterdir()} == {"latency.png", "ttft.png", "kept.png"}
    assert page.read_text(encoding="utf-8").count("data:image/") >= 3


@pytest.mark.slow
def test_clips_of_the_demo_model(tmp_path: Path) -> None:
    pytest.importorskip("av")
    import tokprune.demo

    clip = tokprune.demo.held_out_clips(1, folder=tmp_path)[0]
    out, plots = tmp_path / "v.json", tmp_path / "plots"
    common = ["--methods", "uniform,divprune", "--ratios", "0.25", "--repeats", "1", "--new-tokens", "3"]
    spent(["profile", "--video", str(clip.path), "--frames", "4", *common, "--json", str(out), "--plots", str(plots)])
    made = ProfileReport.load(out)
    assert made.plain.visual == 4 * 64
    assert made.cell("uniform 0.25").visual == 64
    assert "kept_divprune_0.25.png" in {path.name for path in plots.iterdir()}


@pytest.mark.slow
def test_heat_maps_of_the_demo_model(tmp_path: Path) -> None:
    picture, out = tmp_path / "a.png", tmp_path / "heat.png"
    Image.new("RGB", (200, 160), (90, 140, 60)).save(picture)
    spent(
        ["heatmap", "--image", str(picture), "--signals", "cls_attention,keys:-1", "--methods", "hired", "-o", str(out)]
    )
    assert Image.open(out).width > 900
    result = run(app, ["heatmap", "--image", str(picture), "--methods", "divprune", "-o", str(out)])
    assert "gives no score per token" in str(result.exception)


def small_qwen() -> Preset:
    """The preset's family and picture rules with two thin layers each."""
    known = preset("qwen2.5-vl-3b")
    text = dict(known.config["text_config"]) | {
        "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 1100,
    }  # fmt: skip
    vision = dict(known.config["vision_config"]) | {
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 256,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    marks = {"image_token_id": 1001, "video_token_id": 1002, "vision_start_token_id": 1003, "vision_end_token_id": 1004}
    config = dict(known.config) | marks | {"text_config": text, "vision_config": vision}
    return replace(known, config=config, published=preset("llava-1.5-7b").published)


def test_random_weights_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokprune.cli.profile_inputs.preset", lambda name: small_qwen())
    out = tmp_path / "r.json"
    asked = ["--preset", "qwen2.5-vl-3b", "--random-weights", "--dtype", "float32", "--tokens", "100", "--text", "8"]
    few = ["--methods", "random", "--ratios", "0.25", "--repeats", "1", "--new-tokens", "2", "--batch", "2"]
    result = run(app, ["profile", *asked, *few, "--json", str(out)])
    assert result.exception is None, result.exception
    assert "99 visual tokens (the nearest to 100" in result.output
    made = ProfileReport.load(out)
    assert [c.name for c in made.cells] == ["plain", "random 0.25", "ideal 0.25", "resized 0.25"]
    assert [c.visual for c in made.cells[:3]] == [99, 25, 25]
    assert 20 <= made.cell("resized 0.25").visual <= 30
    assert made.cell("resized 0.25").flops["vision"] < 0.4 * made.plain.flops["vision"]
    for cell in made.cells:
        assert cell.cache_bytes == cell.cache_expected == 2 * 2 * 2 * 128 * 4 * (cell.prompt + 1)
    assert made.batch == 2
    assert any("measured here" in row["ours_is"] or row["ours"] for row in made.published)


def test_a_model_on_disk_its_picture_and_its_smaller_rival(tmp_path: Path) -> None:
    """A tiny Qwen2.5-VL with its real processor, saved and opened again by the command."""
    pytest.importorskip("jinja2")
    tiny = build("qwen2_5_vl")
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    picture, out, page = tmp_path / "a.png", tmp_path / "p.json", tmp_path / "p.html"
    Image.new("RGB", (96, 64), (200, 60, 30)).save(picture)
    asked = ["--model", str(tmp_path / "model"), "--image", str(picture), "--question", "ab", "--batch", "2"]
    few = ["--methods", "random,uniform", "--ratios", "0.25", "--repeats", "1", "--new-tokens", "2"]
    more = ["--dtype", "bfloat16", "--attn", "eager", "--json", str(out), "--html", str(page)]
    result = run(app, ["profile", *asked, *few, *more])
    assert result.exception is None, result.exception
    made = ProfileReport.load(out)
    assert [c.name for c in made.cells] == ["plain", "random 0.25", "uniform 0.25", "ideal 0.25", "resized 0.25"]
    assert (made.batch, made.environment["dtype"], made.environment["attention"]) == (2, "bfloat16", "eager")
    assert made.cell("random 0.25").visual == round(0.25 * made.plain.visual)
    assert made.cell("resized 0.25").flops["vision"] < 0.5 * made.plain.flops["vision"]
    assert "What was kept" in page.read_text(encoding="utf-8")
