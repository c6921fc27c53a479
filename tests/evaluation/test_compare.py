"""The table of a sweep in every format, and two runs compared question by question."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest
from rich.console import Console

from tests.evaluation.runs import ENVIRONMENT, QUESTIONS, run_cell
from tokprune.errors import OptionError
from tokprune.evaluation import export
from tokprune.evaluation.cells import Cell, Sample, SweepSettings, plan
from tokprune.evaluation.compare import compare_sweeps
from tokprune.evaluation.significance import holm, mcnemar
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import TOTAL, pair, rows_of, scores_of
from tokprune.files import check_writable

CELLS = plan(["scenes", "clips"], ["none", "random", "divprune"], [0.5, 0.1])


def sweep_of(cells=CELLS, **changes):
    settings = dataclasses.replace(SweepSettings("demo", limit=QUESTIONS), **changes)
    return Sweep(settings, dict(ENVIRONMENT), [run_cell(c) for c in cells])


def printed(what, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def test_rows_compare_with_the_baseline_of_their_task():
    rows = rows_of(sweep_of())
    assert [r.paired is None for r in rows] == [r.method == "none" for r in rows]
    row = next(r for r in rows if (r.task, r.method, r.ratio) == ("scenes", "random", 0.1))
    base, other = (scores_of(run_cell(c), "accuracy") for c in (CELLS[0], Cell("scenes", "random", 0.1)))
    lost = sum(base[q] > other[q] for q in base)
    won = sum(base[q] < other[q] for q in base)
    assert lost > 10
    assert (row.paired.worse, row.paired.better) == (lost, won)
    assert row.paired.p == mcnemar(won, lost)
    assert row.score == pytest.approx(100 * sum(other.values()) / QUESTIONS)
    compared = [r for r in rows if r.paired]
    assert [r.p_holm for r in compared] == holm([r.paired.p for r in compared])


def test_without_a_baseline_nothing_is_compared_and_the_table_says_so():
    rows = rows_of(sweep_of(plan(["scenes"], ["random"], [0.5])))
    assert rows[0].paired is None
    assert "add none to --methods" in export.caption(rows)


def test_questions_without_a_score_give_a_reason():
    base, other = run_cell(CELLS[0]), run_cell(CELLS[1])
    bare = dataclasses.replace(other, samples=tuple(dataclasses.replace(s, scores={}) for s in other.samples))
    assert pair(base, bare) == (None, "no comparison: accuracy is not scored question by question")
    else_where = tuple(dataclasses.replace(s, doc_id=s.doc_id + 1000) for s in other.samples)
    assert (
        pair(base, dataclasses.replace(other, samples=else_where))[1] == "no comparison: the two runs share no question"
    )
    fewer = dataclasses.replace(other, samples=other.samples[:30])
    paired, note = pair(base, fewer)
    assert paired.n == 30
    assert "10 questions" in note


def test_questions_without_a_picture_are_counted():
    result = run_cell(CELLS[0])
    blind = tuple(dataclasses.replace(s, costs={TOTAL: 0.0 if s.doc_id < 3 else 256.0}) for s in result.samples)
    rows = rows_of(dataclasses.replace(sweep_of(), results=[dataclasses.replace(result, samples=blind)]))
    assert rows[0].note == "3 questions came without a picture"
    assert "3 questions came without a picture" in export.caption(rows)


def test_a_question_asked_twice_counts_with_its_mean():
    result = run_cell(CELLS[0])
    twice = dataclasses.replace(
        result, samples=(Sample("t", 1, "", "", {"accuracy": 1.0}), Sample("t", 1, "", "", {"accuracy": 0.0}))
    )
    assert scores_of(twice, "accuracy") == {("t", 1): 0.5}


def test_terminal_table_fits_80_columns():
    text = printed(export.terminal(rows_of(sweep_of()), "demo"))
    assert max(map(len, text.splitlines())) <= 80
    line = next(part for part in text.splitlines() if "random" in part and "10 %" in part)
    assert "26/256" in line
    assert "[-" in line
    assert "600 M" in line
    assert "1.00 ms" in line or "1 ms" in line
    assert "Holm" in text
    assert [part for part in text.splitlines() if part.endswith(", demo")] == ["scenes, demo", "clips, demo"]


def test_other_metrics_have_a_table_of_their_own():
    result = dataclasses.replace(run_cell(CELLS[0]), metrics={"accuracy": 0.9, "read": 0.5, "scenes_total": 12.5})
    sweep = dataclasses.replace(sweep_of(), results=[result, *map(run_cell, CELLS[1:])])
    (table,) = export.details(sweep)
    assert (table.title, table.heads) == ("scenes, other metrics", ["method", "keep", "read", "total"])
    assert table.body[0] == ["none", "100 %", "50.0", "12.5"]
    assert table.body[1] == ["random", "50 %", "", ""]


def test_csv_has_every_number():
    rows = rows_of(sweep_of())
    lines = list(csv.DictReader(io.StringIO(export.to_csv(rows))))
    assert len(lines) == len(rows)
    line = next(r for r in lines if r["task"] == "clips" and r["method"] == "divprune" and r["ratio"] == "0.1")
    row = next(r for r in rows if (r.task, r.method, r.ratio) == ("clips", "divprune", 0.1))
    assert float(line["score"]) == row.score
    assert float(line["difference"]) == pytest.approx(100 * row.paired.difference)
    assert float(line["ci_low"]) <= float(line["difference"]) <= float(line["ci_high"])
    assert float(line["p_holm"]) == row.p_holm
    assert line["test"] == "mcnemar"
    assert lines[0]["difference"] == ""


def test_markdown_and_latex_have_a_line_per_cell():
    rows = rows_of(sweep_of())
    text = export.to_markdown(rows)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1
    tex = export.to_latex(rows)
    assert tex.count(r" \\") == len(rows) + 1
    assert r"50 \%" in tex
    assert r"\begin{tabular}{llrrrrrrrr}" in tex
    assert all("%" not in line.replace(r"\%", "") for line in tex.splitlines() if not line.startswith("%"))


def test_files_that_cannot_be_written_are_explained(tmp_path):
    with pytest.raises(OptionError, match="cannot write"):
        export.write(rows_of(sweep_of()), "csv", "/proc/nowhere/table.csv")
    with pytest.raises(OptionError, match="cannot write"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "table.csv")
    assert list((tmp_path / "new").iterdir()) == []
    export.write(rows_of(sweep_of()), "csv", tmp_path / "new" / "table.csv")
    assert (tmp_path / "new" / "table.csv").read_text().startswith("task,method")


def test_plots_of_a_sweep():
    pytest.importorskip("matplotlib")
    from tokprune.evaluation.report import figures

    plots = figures(rows_of(sweep_of()))
    assert [p.name for p in plots] == [
        f"{task}_{kind}" for task in ("scenes", "clips") for kind in ("ratio", "tokens", "flops", "ttft")
    ]
    axes = plots[0].figure.axes[0]
    assert {line.get_label() for line in axes.get_lines()} >= {"random", "divprune"}


def test_report_is_one_page_with_everything():
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from tokprune.evaluation.report import figures, page
    from tokprune.viz.html import render

    sweep = sweep_of()
    rows = rows_of(sweep)
    text = render(page(sweep, rows, figures(rows)[:1], reference=True))
    for words in (
        "What pruning loses: demo",
        "divprune",
        "scenes",
        "Holm",
        "0.7.3",
        "Published numbers",
        "data:image/",
    ):
        assert words in text


def test_a_run_compared_with_itself_changes_nothing():
    found = compare_sweeps(sweep_of(), sweep_of())
    assert len(found.rows) == len(CELLS)
    assert all(r.paired.difference == 0 and r.paired.p == 1 for r in found.rows)
    assert found.changes == []
    assert found.alone == []


def test_compare_pairs_cells_and_says_what_else_changed():
    second = sweep_of(plan(["scenes"], ["none", "random"], [0.5]), dtype="bfloat16")
    second.environment["torch"] = "3"
    second.results[1] = dataclasses.replace(
        second.results[1],
        samples=tuple(dataclasses.replace(s, scores={"accuracy": 0.0}) for s in second.results[1].samples),
        metrics={"accuracy": 0.0},
    )
    found = compare_sweeps(sweep_of(), second)
    assert [(r.method, r.ratio) for r in found.rows] == [("none", 1.0), ("random", 0.5)]
    assert found.rows[1].paired.difference < -0.4
    assert found.rows[1].paired.p < 0.001
    assert "torch: 2 then 3" in found.changes
    assert "dtype: auto then bfloat16" in found.changes
    assert "clips, none" in found.alone
    text = printed(found.table("a.json", "b.json"), 120)
    assert "differs: torch: 2 then 3" in text
    assert "<0.0001" in text


def test_compare_pairs_the_only_cells_of_a_task():
    found = compare_sweeps(
        sweep_of(plan(["scenes"], ["random"], [0.5])), sweep_of(plan(["scenes"], ["divprune"], [0.1]))
    )
    assert (found.first[0].method, found.rows[0].method) == ("random", "divprune")
    assert "random, divprune" in printed(found.table(), 120)


def test_runs_with_nothing_in_common_are_refused():
    with pytest.raises(OptionError, match=r"no cell in common.*clips, none"):
        compare_sweeps(sweep_of(plan(["scenes"], ["none"], [])), sweep_of(plan(["clips"], ["none"], [])))
