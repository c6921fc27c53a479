"""What `make bench` and `make bench-gpu` run: rows know their verdict, the page says what bounds a miss, and the
command for a GPU runs at tiny sizes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.suite import gpu, llm, report
from benchmarks.suite.rows import Row, load, number, paired, ratio, save
from tokprune.profiling.timing import Measurement


def test_a_row_meets_its_target_or_misses_it() -> None:
    slow = Measurement("x", "ms", (3.0, 5.0, 4.0))
    assert Row("x", slow, 4.0).met
    assert not Row("x", slow, 3.9).met
    assert Row("x", slow, 4.0, at_least=True).met
    assert not Row("x", slow, 4.1, at_least=True).met
    assert Row("x", slow).met is None
    assert ratio("r", [2.0, 4.0], [1.0, 2.0]).samples == (2.0, 2.0)


def test_measure_sees_a_sleep() -> None:
    m = gpu.measure(lambda: time.sleep(0.01), "cpu", repeats=3, warmup=1, name="time")
    assert m.unit == "ms"
    assert 9.0 < m.median < 60.0
    assert len(m.samples) == 3


def test_a_section_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = [Row("a", Measurement("a", "ms", (1.0, 2.0)), 3.0, False, "why", {"ours_ms": 1.0}), Row("b", number("b", 7))]
    data = load(save(tmp_path, "start", rows))
    assert data["rows"] == rows
    assert data["section"] == "start"
    assert data["environment"]["cpus"]
    page = report.blocks(tmp_path)
    assert "| a | ≤ 3 ms | 1.5 ± 0.25 ms (ours 1 ms) | met |" in page
    assert "| b |  | 7 |  |" in page
    assert page.count("run `make bench-gpu`") == 1
    assert "| not measured |" in page


def test_a_miss_says_what_bounds_it() -> None:
    missed = Row("a", number("a", 9), 3.0, False, "the bus")
    assert "missed; limit: the bus" in report.table([missed])[-1]
    noisy = Row("a", Measurement("a", "", (0.7, 0.9, 1.1)), 0.95, True, "the bus")
    assert "open: the target lies within" in report.table([noisy])[-1]
    with pytest.raises(SystemExit, match="what bounds it"):
        report.table([Row("a", number("a", 9), 3.0)])


def test_cells_take_turns() -> None:
    order: list[str] = []
    found = paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, lambda: float(len(order)), 3)
    assert found == {"a": [1e3] * 3, "b": [1e3] * 3}
    assert len(order) == 8
    assert order == [*"abba", *"baab"]


def test_the_command_for_a_gpu_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MODELS", gpu.MODELS[:1])
    monkeypatch.setattr(gpu, "BATCHES", (2,))
    monkeypatch.setattr(gpu, "CHOICES", gpu.CHOICES[:1])
    said: list[str] = []
    rows = gpu.run("cpu", True, tmp_path, 8, said.append)
    kinds = [row.what.split(": ")[-1].split(",")[0] for row in rows]
    assert kinds == ["DivPrune"] * 2 + [
        *("prefill with divprune", "selection and hooks of divprune", "decoding behind divprune"),
        *("prefill with hired", "selection and hooks of hired", "decoding behind hired"),
    ]
    assert all(sample > 0 for row in rows if row.at_least for sample in row.measured.samples)
    assert len(json.loads((tmp_path / "bench_gpu_tiny.json").read_text())["rows"]) == len(rows)
    assert gpu.run("cpu", True, tmp_path, -1, said.append) == []
    assert said[-1].startswith("left out")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in gpu.MODELS])
def test_prompts_of_a_ragged_batch_are_what_each_is_alone(name: str) -> None:
    """The batch that is timed is a right one: padded on the left, pictures in order."""
    from tokprune.profiling.build import build_random
    from tokprune.profiling.inputs import random_inputs

    known = llm.tiny(name)
    model = build_random(known, "cpu", torch.float32)
    sizes = [(112, 168), (84, 168)]
    with torch.no_grad():
        whole = model(**llm.ragged(known, model, 2, sizes[0])).logits[:, -1]
        for i, size in enumerate(sizes):
            alone = model(**random_inputs(known, model, size, text=32 + 12 * i, seed=i)).logits[0, -1]
            assert torch.allclose(whole[i], alone, atol=1e-4)


def test_a_row_beside_its_limit_says_how_far_it_is_from_it() -> None:
    slow = number("a", 0.9)
    assert (
        Row("a", slow, 0.5, False, "one product", {"over_limit": 1.1}).verdict == "at its limit, 1.10 times one product"
    )
    assert Row("a", slow, 0.5, False, "one product", {"over_limit": 1.3}).verdict == "missed; limit: one product"
    assert Row("a", slow, 1.0, False, "one product", {"over_limit": 1.3}).verdict == "met"
