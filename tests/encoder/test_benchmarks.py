"""The encoder benchmarks: matching of FLOPs, rows of a small run, and tables that say where their numbers come from."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports a script of benchmarks/ as it is when run: with its folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def get(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield get
    for name in ("encoder_record", "encoder_demo", "encoder_tables", "images_per_second"):
        sys.modules.pop(name, None)


def test_the_strength_is_set_to_the_wanted_flops(load) -> None:
    demo = load("encoder_demo")
    share, found = demo.matched(lambda s: 0.3 + 0.7 * s, 0.65)
    assert share == pytest.approx(0.5, abs=0.01)
    assert abs(found - 0.65) <= 0.005
    steps = demo.matched(lambda s: 0.5 if s < 0.7 else 0.9, 0.6)  # a method that can only do these two
    assert steps[1] == 0.5
    assert demo.matched(lambda s: 0.4 * s, 0.75) == (1.0, 0.4)  # one that cannot do so little


def test_images_per_second_of_a_small_model(load, capsys) -> None:
    bench = load("images_per_second")
    wanted = bench.variants(["tome", "evit"], 0.5, 8)
    assert [v.name for v in wanted] == ["none", "tome, r=8", "tome, ratio=0.5", "evit, ratio=0.5"]
    rows = bench.measure("vit_tiny_patch16_224", 1, wanted, 1, "cpu", False)
    assert rows[0]["flops"] == rows[0]["speedup"] == 1
    assert rows[1]["flops"] == pytest.approx(rows[2]["flops"], abs=0.03)  # 197 - 12 * 8 is about a half
    assert all(r["flops"] < 0.8 for r in rows[1:])
    assert all(r["images_per_second"] > 0 for r in rows)


def test_tables_have_a_row_per_measurement_and_name_their_source(load) -> None:
    tables = load("encoder_tables")
    head = {"command": "python x.py", "commit": "abc", "environment": {"machine": "m", "torch": "2"}}
    row = {"model": "v", "batch": 8, "variant": "tome", "images_per_second": 3.0, "speedup": 1.5, "flops": 0.6}
    text = tables.images({**head, "device": "cpu", "dtype": "float32", "rounds": 3, "rows": [row]})
    assert "| v | 8 | tome | 3.00 | ×1.50 | 60% |" in text
    assert "`python x.py` at commit abc, m, torch 2." in text
    row = {
        "method": "ats",
        "target": 0.6,
        "flops": 0.41,
        "matched": False,
        "left": 0.2,
        "places": 0.5,
        "copies": 0.3,
        "encoder_ms": 2.0,
        "baseline_ms": 3.0,
    }
    facts = {"questions": 160, "rounds": 9, "pictures": 16, "tolerance": 0.02}
    text = tables.demo({**head, **facts, "rows": [{**row, "method": "none", "matched": True}, row]})
    assert "| ats | 41.0% * | 20% | 0.500 | 0.300 | 2.00 | 3.00 |" in text


def test_the_tables_of_the_page_are_current(load) -> None:
    tables = load("encoder_tables")
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text) == text, "run: python benchmarks/encoder_tables.py"


def test_results_say_what_they_were_measured_with(load, tmp_path) -> None:
    record = load("encoder_record")
    record.save(tmp_path / "a" / "x.json", "kind", {"rows": [1]})
    data = json.loads((tmp_path / "a" / "x.json").read_text())
    assert data["type"] == "kind"
    assert data["rows"] == [1]
    assert {"command", "commit", "environment"} <= set(data)
    assert "machine" in data["environment"]
