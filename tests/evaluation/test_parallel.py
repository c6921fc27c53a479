"""The same evaluation in one process and in two: the same answers, none lost, and an error in one ends both."""

from __future__ import annotations

from pathlib import Path

import pytest

import tokprune.demo
from tests.evaluation.lmms_cli import lmms_eval
from tests.evaluation.lmms_tasks import color_examples, write_task

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.slow

MODEL = "pretrained=demo,method=divprune,ratio=0.1,flops_samples=1"


def test_two_processes_answer_as_one(tmp_path: Path) -> None:
    examples = tokprune.demo.held_out(7, seed=5)  # an odd number: one process has a row less
    write_task(tmp_path / "tasks" / "a", "seven_rows", examples)
    write_task(tmp_path / "tasks" / "b", "two_rows", examples[:2])
    runs = [
        lmms_eval(tmp_path / f"out{n}", MODEL, "seven_rows,two_rows", tmp_path / "tasks", processes=n) for n in (1, 2)
    ]
    for run in runs:
        assert run.code == 0, run.output[-4000:]
        assert run.results is not None
    one, two = runs
    for task, count in (("seven_rows", 7), ("two_rows", 2)):
        alone, together = one.samples(task), two.samples(task)
        assert [s["doc_id"] for s in alone] == [s["doc_id"] for s in together] == list(range(count))
        assert [s["said"] for s in alone] == [s["said"] for s in together]
        assert [s["tokens"] for s in alone] == [s["tokens"] for s in together]
        scores = [r.results["results"][task] for r in runs if r.results]
        assert scores[0]["accuracy,none"] == scores[1]["accuracy,none"]
    costs = [r.results["throughput"] for r in runs if r.results]
    # Means over all rows of all processes, the ones that fill up a process not counted.
    for name in ("avg_kept_tokens", "avg_total_tokens", "avg_prompt_tokens", "avg_new_tokens", "avg_keep_ratio"):
        assert costs[0][name] == pytest.approx(costs[1][name]), name
    assert costs[0]["total_gen_tokens"] == costs[1]["total_gen_tokens"]


def test_an_error_in_one_process_ends_both_with_its_row(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "one_missing", color_examples(4), missing=3)  # a row of the second process
    run = lmms_eval(tmp_path / "out", MODEL, "one_missing", tmp_path / "tasks", processes=2, timeout=600)
    assert run.code != 0
    assert run.results is None
    assert run.output.count("task 'one_missing', doc_id 3") >= 2  # both processes say it
