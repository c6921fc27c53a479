"""`tokprune demo`, `show` and `profile` as a user runs them, on few questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tokprune.cli.app import app

run = CliRunner().invoke
SCENE = Path(__file__).parent.parent.parent / "docs" / "images" / "scene.png"


def test_demo_writes_cells_and_pictures(tmp_path):
    arguments = ["--questions", "21", "--methods", "none,random,divprune", "--ratios", "1,0.1"]
    result = run(
        app, ["demo", *arguments, "--json", str(tmp_path / "a" / "demo.json"), "--overlays", str(tmp_path / "b")]
    )
    assert result.exception is None, result.output
    assert "divprune" in result.output
    data = json.loads((tmp_path / "a" / "demo.json").read_text())
    cells = {(c["method"], c["ratio"]): c for c in data["cells"]}
    assert set(cells) == {("none", 1.0), ("random", 1.0), ("random", 0.1), ("divprune", 1.0), ("divprune", 0.1)}
    for cell in cells.values():
        assert {"method", "ratio", "accuracy", "kept", "total", "prefill_ms", "flops"} <= set(cell)
        assert cell["total"] == 256
        assert cell["kept"] == (256 if cell["ratio"] == 1 else 26)
        assert cell["prefill_ms"] > 0
    assert cells["none", 1.0]["accuracy"] >= 0.75
    assert cells["random", 1.0]["accuracy"] == cells["none", 1.0]["accuracy"]
    assert cells["random", 1.0]["flops"] == cells["none", 1.0]["flops"]
    assert cells["divprune", 0.1]["flops"] < 0.7 * cells["none", 1.0]["flops"]
    assert cells["divprune", 0.1]["accuracy"] > cells["random", 0.1]["accuracy"] - 0.1
    pictures = sorted((tmp_path / "b").glob("*.png"))
    assert len(pictures) == 4
    assert Image.open(pictures[0]).width > 600


def test_own_picture():
    arguments = [
        "demo",
        "--image",
        str(SCENE),
        "--question",
        "what color is the circle ?",
        "--methods",
        "none,divprune",
    ]
    result = run(app, [*arguments, "--ratios", "0.1"])
    assert result.exception is None, result.output
    assert "pink" in result.output
    assert "26/256" in result.output


def test_show(tmp_path):
    out = tmp_path / "kept.png"
    result = run(
        app, ["show", "--image", str(SCENE), "--methods", "divprune,tome_merge", "--ratio", "0.1", "-o", str(out)]
    )
    assert result.exception is None, result.output
    assert Image.open(out).width > 600


def test_profile(tmp_path):
    out = tmp_path / "profile.json"
    result = run(
        app, ["profile", "--methods", "divprune", "--ratios", "0.1", "--new-tokens", "4", "--json", str(out), "-q"]
    )
    assert result.exception is None, result.output
    data = json.loads(out.read_text())
    assert {c["name"] for c in data["cells"]} >= {"plain", "divprune 0.1"}


def test_plan(tmp_path):
    out = tmp_path / "plan.json"
    arguments = ["plan", "--preset", "llava-1.5-7b", "--gpu", "a100", "--target", "ttft", "--limit", "0.03"]
    result = run(app, [*arguments, "--json", str(out)])
    assert result.exception is None, result.output
    assert "connector stage" in result.output
    made = json.loads(out.read_text())
    assert 0 < made["connector_tokens"] < 576
    assert [r["ratio"] for r in made["rows"]] == [1.0, 0.5, 0.25, 0.1, 0.05]


@pytest.mark.parametrize("target", ["/proc/nowhere/demo.json"])
def test_unwritable_file_is_explained(target):
    result = run(app, ["demo", "--questions", "7", "--methods", "none", "--ratios", "1", "--json", target])
    assert "cannot write" in str(result.exception)
