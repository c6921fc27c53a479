"""The sweep: which cells run, what a kill or a failing cell leaves, and that a resumed run gives the same file."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time

import pytest

from tests.evaluation.runs import ENVIRONMENT, run_cell
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, SweepSettings, plan
from tokprune.evaluation.errors import failure, root_cause
from tokprune.evaluation.results import load, results_json, timing_json
from tokprune.evaluation.store import Store, StoreError
from tokprune.evaluation.sweep import Watcher, run_sweep
from tokprune.evaluation.table import rows_of
from tokprune.evaluation.team import Team

CELLS = plan(["scenes", "clips"], ["none", "random", "divprune"], [0.1, 0.5])
SETTINGS = SweepSettings("demo", limit=40)


def sweep_in(folder, runner=run_cell, cells=CELLS, **more):
    store = Store(folder, SETTINGS, ENVIRONMENT).open()
    try:
        return run_sweep(cells, store, runner, **more)
    finally:
        store.close()


def test_plan_runs_the_baseline_once_and_falls_in_ratio():
    assert [(c.task, c.method, c.ratio) for c in CELLS[:5]] == [
        ("scenes", "none", 1.0),
        ("scenes", "random", 0.5),
        ("scenes", "random", 0.1),
        ("scenes", "divprune", 0.5),
        ("scenes", "divprune", 0.1),
    ]
    assert len(CELLS) == 10
    assert plan(["a", "a"], ["none"], []) == (Cell("a", "none", 1.0),)
    assert [c.method for c in plan(["a"], ["tome+divprune"], [0.5])] == ["tome+divprune"]


@pytest.mark.parametrize(
    ("tasks", "methods", "ratios", "words"),
    [
        ([], ["none"], [1], "--tasks"),
        (["a"], [], [1], "--methods"),
        (["a"], ["divprune"], [], "--ratios"),
        (["a"], ["divprun"], [0.5], "divprune"),
        (["a"], ["divprune"], [10], "ratio=0.1"),
        (["a"], ["tome+divprun"], [0.5], "divprune"),
    ],
)
def test_plan_refuses_what_cannot_run(tasks, methods, ratios, words):
    with pytest.raises(OptionError, match=words):
        plan(tasks, methods, ratios)


@pytest.mark.parametrize(
    "wrong", [{"limit": 0}, {"limit": 0.5}, {"batch_size": 0}, {"frames": True}, {"positions": "compct"}]
)
def test_settings_refuse_what_is_no_count(wrong):
    with pytest.raises(OptionError):
        SweepSettings("demo", **wrong)


def test_finished_cells_do_not_run_again(tmp_path):
    first = sweep_in(tmp_path)

    def never(cell):
        raise AssertionError(f"{cell} ran again")

    again = sweep_in(tmp_path, never)
    assert results_json(again) == results_json(first)
    assert [r.cell for r in again.results] == list(CELLS)
    assert all(r.timing["seconds"] >= 0 for r in again.results)


def test_more_ratios_only_run_the_new_cells(tmp_path):
    sweep_in(tmp_path)
    ran = []
    more = plan(["scenes"], ["none", "divprune"], [0.1, 0.25])
    sweep_in(tmp_path, lambda cell: ran.append(cell) or run_cell(cell), more)
    assert ran == [Cell("scenes", "divprune", 0.25)]


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    bad = Cell("scenes", "random", 0.5)
    ran = []

    def runner(cell):
        ran.append(cell)
        if cell == bad:
            raise FileNotFoundError("no such file: clip_7.mp4 (row 7)")
        return run_cell(cell)

    seen = []

    class Seen(Watcher):
        def fail(self, failed):
            seen.append(failed.cell)

    sweep = sweep_in(tmp_path, runner, watcher=Seen())
    assert ran == list(CELLS)
    assert seen == [bad]
    assert [f.cell for f in sweep.failures] == [bad]
    assert sweep.failures[0].error == "FileNotFoundError"
    assert "clip_7.mp4" in sweep.failures[0].reason
    assert len(sweep.results) == len(CELLS) - 1
    assert json.loads(results_json(sweep))["failed"][0]["reason"] == "no such file: clip_7.mp4 (row 7)"
    # What failed is not tried again by itself, but on demand.
    ran.clear()
    again = sweep_in(tmp_path, runner)
    assert ran == []
    assert again.failures[0].reason == sweep.failures[0].reason
    whole = sweep_in(tmp_path, run_cell, retry_failed=True)
    assert whole.failures == []
    assert results_json(whole) == results_json(sweep_in(tmp_path / "other"))


def test_a_task_that_calls_exit_is_a_failed_cell(tmp_path):
    def runner(cell):
        sys.exit("video path: x.mp4 does not exist")

    sweep = sweep_in(tmp_path, runner, CELLS[:1])
    assert "x.mp4 does not exist" in sweep.failures[0].reason


def test_a_disk_that_is_full_ends_the_sweep_and_it_resumes(tmp_path, monkeypatch):
    real = Store.save

    def save(self, result):
        if result.cell == CELLS[3]:
            raise StoreError(f"cannot store the cell {result.cell}: the disk is full")
        real(self, result)

    monkeypatch.setattr(Store, "save", save)
    with pytest.raises(StoreError, match=r"scenes, divprune at 0\.5"):
        sweep_in(tmp_path)
    monkeypatch.undo()
    ran = []
    whole = sweep_in(tmp_path, lambda cell: ran.append(cell) or run_cell(cell))
    assert ran == list(CELLS[3:])
    assert results_json(whole) == results_json(sweep_in(tmp_path / "other"))


def test_root_cause_looks_behind_retries():
    class Attempt:
        def exception(self):
            return FileNotFoundError("scenes.jsonl")

    class RetryError(Exception):
        last_attempt = Attempt()

    assert isinstance(root_cause(RetryError()), FileNotFoundError)
    told = OptionError("row 3 has no image")
    told.__cause__ = KeyError("image")
    assert failure(CELLS[0], told).reason == "row 3 has no image"
    wrapped = RuntimeError("cannot make the dataset")
    wrapped.__cause__ = FileNotFoundError("rows.jsonl")
    assert failure(CELLS[0], wrapped).reason == "rows.jsonl"
    assert failure(CELLS[0], RuntimeError()).reason == "RuntimeError without a message"


def test_ranks_other_than_the_first_run_the_same_cells_and_write_nothing(tmp_path):
    class Second(Team):
        def agree(self, value):
            return list(CELLS[1:3])  # what rank 0 says

    ran = []
    sweep = sweep_in(tmp_path, lambda cell: ran.append(cell), team=Second(1, 2))
    assert ran == list(CELLS[1:3])
    assert sweep.results == []
    assert list((tmp_path / "cells").iterdir()) == []


def test_under_torchrun_a_failure_ends_the_run_but_is_noted(tmp_path):
    class First(Team):
        def agree(self, value):
            return value

    def runner(cell):
        raise ValueError("row 3")

    with pytest.raises(ValueError, match="row 3"):
        sweep_in(tmp_path, runner, team=First(0, 2))
    rest = sweep_in(tmp_path, run_cell)
    assert [f.reason for f in rest.failures] == ["row 3"]
    assert len(rest.results) == len(CELLS) - 1


def test_results_round_trip_and_keep_the_clock_out(tmp_path):
    sweep = sweep_in(tmp_path)
    text = results_json(sweep, ["tokprune", "eval"])
    data = json.loads(text)
    assert data["type"] == "tokprune.eval"
    assert data["version"] == 1
    assert data["command"] == ["tokprune", "eval"]
    assert len(data["cells"][0]["samples"]) == 40
    assert "seconds" not in text
    assert "ttft" not in text
    assert data["methods"]["random"][0]["options"]["seed"] == 0
    assert {c["task"] for c in data["comparisons"]} == {"scenes", "clips"}
    (tmp_path / "results.json").write_text(text)
    (tmp_path / "timing.json").write_text(timing_json(sweep))
    back = load(tmp_path)
    assert back.results == sweep.results
    assert rows_of(back) == rows_of(sweep)


@pytest.mark.parametrize("text", ["{", "[]", '{"type": "other"}', '{"type": "tokprune.eval", "version": 9}'])
def test_files_that_are_no_results_are_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(OptionError, match=r"results\.json"):
        load(tmp_path)


def sweep_process(folder, seconds, begun):
    """A sweep in a process of its own; each cell takes `seconds`."""

    def slow(cell):
        begun.send(str(cell))
        time.sleep(seconds)
        return run_cell(cell)

    store = Store(folder, SETTINGS, ENVIRONMENT).open()
    store.write("results.json", results_json(run_sweep(CELLS, store, slow), ["eval"]))
    begun.close()


def start(folder, seconds):
    context = multiprocessing.get_context("fork")  # torch is imported already
    seen, begun = context.Pipe(duplex=False)
    process = context.Process(target=sweep_process, args=(folder, seconds, begun))
    process.start()
    begun.close()
    return process, seen


def drain(process, seen):
    """Let it end; the cells that it ran."""
    cells = []
    with contextlib.suppress(EOFError):
        while True:
            cells.append(seen.recv())
    process.join()
    assert process.exitcode == 0
    return cells


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not hasattr(os, "fork"), reason="no processes to kill here")
def test_killed_and_started_again_gives_the_same_file(tmp_path):
    """SIGKILL in the middle of a cell, three times, each later; then the same bytes as an undisturbed run."""
    folder = tmp_path / "killed"
    for at in (1, 2, 3):
        process, seen = start(folder, 0.3)
        for _ in range(at + 1):
            seen.recv()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finished = len(list(folder.glob("cells/*/result.json")))
    assert finished == 6
    assert not (folder / "results.json").exists()
    assert drain(*start(folder, 0)) == [str(c) for c in CELLS[finished:]]
    whole = tmp_path / "whole"
    assert len(drain(*start(whole, 0))) == len(CELLS)
    assert (folder / "results.json").read_bytes() == (whole / "results.json").read_bytes()
