"""`tokprune doctor`: what it says of an installation and of a model, and what it refuses in seconds."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tokprune.cli.app import app
from tokprune.errors import OptionError, install_line
from tokprune.testing import Check, build, diagnose


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *words], env={"COLUMNS": "200"})


def test_versions_devices_and_parts() -> None:
    result = invoke("--json", "-")
    told = json.loads(result.stdout)
    assert {p["name"] for p in told["packages"]} >= {"torch", "transformers", "numpy", "pillow"}
    assert {e["name"] for e in told["extras"]} >= {"vision", "video", "eval", "plot"}
    assert told["devices"][0].startswith("cpu")
    assert result.exit_code == (0 if told["ok"] else 1)
    plain = invoke()
    assert "transformers" in plain.stdout
    assert "optional parts" in plain.stdout


def test_a_version_outside_the_tested_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "99.0" if n == "transformers" else real(n))
    (transformers,) = (p for p in diagnose().packages if p.name == "transformers")
    assert transformers.ok is False
    result = invoke()
    assert result.exit_code == 1
    assert "transformers 99.0, tested: " in result.stdout


def test_a_missing_part_is_no_failure_but_names_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    before = diagnose().ok
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert diagnose().ok is before
    assert install_line("plot") in invoke().stdout


def test_a_failed_check_fails_and_an_impossible_one_does_not() -> None:
    good, bad, none = Check("a", True), Check("b", False, "why"), Check("c", None, "no batch")
    base = diagnose().ok
    assert diagnose("m", (good, none)).ok is base
    assert not diagnose("m", (good, bad)).ok


def test_the_embedded_model() -> None:
    told = json.loads(invoke("--model", "demo", "--json", "-").stdout)
    assert [c["ok"] for c in told["checks"]] == [True] * 7
    assert all(told["reach"]["signals"][name]["works"] for name in ("cls_attention", "encoder_features"))
    assert told["reach"]["encoder"]["tome"]["works"]
    assert "keys:-1: keys of block" in invoke("--model", "demo").stdout


def saved(folder: Path, weights: bool) -> Path:
    tiny = build("qwen2_5_vl")
    tiny.processor.save_pretrained(folder)
    if not tiny.processor.chat_template:
        raise AssertionError("the tiny processors have a chat template")
    (tiny.model if weights else tiny.model.config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights", [True, False])
def test_a_model_in_a_folder(tmp_path: Path, weights: bool) -> None:
    words = ["--model", str(saved(tmp_path, weights)), "--json", "-"]
    result = invoke(*words, *([] if weights else ["--random-weights"]))
    told = json.loads(result.stdout)
    assert len(told["checks"]) == 7
    assert [c for c in told["checks"] if c["ok"] is False] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "./no/such"], "no folder"),
        (["--model", "llava-1.5-7b"], "write its owner"),
        (["--model", "nobody/nothing"], "cannot be reached"),
        (["--random-weights"], "--model"),
    ],
)
def test_what_cannot_be_had_is_said_in_seconds(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def unreachable(*args: Any, timeout: float, **kwargs: Any) -> None:
        assert timeout <= 10
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    start = time.perf_counter()
    error = invoke(*words).exception
    assert isinstance(error, OptionError)
    assert said in str(error)
    assert time.perf_counter() - start < 20
