"""`tokprune eval` as a user types it: quick ones with a stand-in for lmms-eval, slow ones on the demo VLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.evaluation.runs import run_cell
from tokprune.cli import eval_run
from tokprune.cli.app import app
from tokprune.cli.eval import count, pairs
from tokprune.errors import OptionError
from tokprune.evaluation.store import StoreError
from tokprune.evaluation.team import Team

ROOT = Path(__file__).parent.parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # several threads only wait for each other on a busy machine


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


class FakeHarness:
    """What Harness is to the command: called with a cell, closed at the end."""

    team = Team()
    ran: list = []

    def __init__(self, request, store, bars, console):
        self.bars = bars

    def __call__(self, cell):
        self.bars.tick(0, 40)
        FakeHarness.ran.append(cell)
        if cell.method == "hired":
            raise ValueError("task 'tokprune_scenes', doc_id 7: no picture in this row")
        self.bars.tick(40, 40)
        return run_cell(cell)

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    FakeHarness.ran = []
    monkeypatch.setattr(eval_run, "_harness", FakeHarness)
    return FakeHarness


def test_a_sweep_from_end_to_end(fake, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    out = tmp_path / "out"
    files = {name: tmp_path / "files" / f"t.{name}" for name in ("csv", "markdown", "latex", "html")}
    options = [f"--{name}={path}" for name, path in files.items()]
    result = run(
        "--methods", "none,random,divprune", "--limit", 40, "--out", out, *options, "--plots", tmp_path / "plots"
    )
    assert result.exit_code == 0, result.output
    assert len(fake.ran) == 7
    assert "divprune" in result.output
    assert "McNemar" in result.output
    data = json.loads((out / "results.json").read_text())
    assert [(c["method"], c["ratio"]) for c in data["cells"]][:3] == [("none", 1.0), ("random", 0.5), ("random", 0.25)]
    assert data["settings"]["limit"] == 40
    assert data["environment"]["torch"]
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        f"tokprune_scenes_{kind}.png" for kind in ("ratio", "tokens", "flops", "ttft")
    }
    assert all(path.stat().st_size > 200 for path in files.values())
    assert len(json.loads((out / "timing.json").read_text())["cells"]) == 7
    # Once more: nothing runs, the same file, the same table.
    before = (out / "results.json").read_bytes()
    again = run("--methods", "none,random,divprune", "--limit", 40, "--out", out)
    assert again.exit_code == 0
    assert len(fake.ran) == 7
    assert json.loads(before)["cells"] == json.loads((out / "results.json").read_text())["cells"]
    compared = run("--compare", out, out / "results.json")
    assert compared.exit_code == 0, compared.output
    assert "second minus first" in compared.output


def test_failed_cells_are_listed_and_the_exit_code_says_so(fake, tmp_path):
    result = run("--methods", "none,hired", "--ratios", "0.5,0.1", "--out", tmp_path)
    assert result.exit_code == 1
    assert "doc_id 7: no picture" in result.output
    assert "2 of 3 cells failed" in result.output
    assert "--retry-failed" in result.output
    assert len(fake.ran) == 3
    assert run("--methods", "none,hired", "--ratios", "0.5,0.1", "--out", tmp_path).exit_code == 1
    assert len(fake.ran) == 3
    assert run("--methods", "none,hired", "--ratios", "0.5,0.1", "--out", tmp_path, "--retry-failed").exit_code == 1
    assert len(fake.ran) == 5


def test_quiet_prints_nothing(fake, tmp_path):
    result = run("--methods", "none", "--out", tmp_path, "-q")
    assert result.exit_code == 0
    assert result.output == ""
    assert (tmp_path / "results.json").exists()


def test_a_full_disk_is_an_error_with_the_cell(fake, tmp_path, monkeypatch):
    def full(self, result):
        raise StoreError(f"cannot store the cell {result.cell}: the disk is full.")

    monkeypatch.setattr(eval_run.Store, "save", full)
    result = run("--methods", "none", "--out", tmp_path)
    assert isinstance(result.exception, StoreError)
    assert "tokprune_scenes, none" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "divprun"], "divprune"),
        (["--ratios", "0.5,x"], "--ratios"),
        (["--ratios", "50"], "ratio=0.5"),
        (["--limit", "0.1"], "--limit 500"),
        (["--limit", "0"], "limit=0"),
        (["--positions", "kep"], "keep"),
        (["--out", "/proc/nowhere"], "--out"),
        (["--csv", "/proc/nowhere/a.csv"], "cannot write"),
        (["--model-args", "seed"], "name=value"),
        (["--model-args", "option.hired.alpha=1", "--methods", "divprune"], "belongs to no method"),
        (["--model-args", "option.hired.alpa=1", "--methods", "hired"], "alpha"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--reference", "--methods", "divprun"], "divprune"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(fake, tmp_path, arguments, words):
    result = run("--out", tmp_path, *arguments)
    assert isinstance(result.exception, OptionError), result.output
    assert words in str(result.exception)
    assert fake.ran == []


def test_reference_prints_tables_without_running(fake):
    result = run("--reference", "--model", "llava-1.5-7b", "--methods", "divprune", "--tasks", "pope")
    assert result.exit_code == 0, result.output
    assert "85.3" in result.output
    assert fake.ran == []


def test_reference_beside_a_run_says_when_there_is_none(fake, tmp_path):
    result = run("--reference", "--model", "demo", "--methods", "none", "--out", tmp_path)
    assert result.exit_code == 0
    assert "There are none for demo" in result.output


def test_small_parsers():
    assert count("500") == 500
    assert count(None) is None
    assert pairs("a=1, b=0.5,c=true,d=x=y,e=none") == {"a": 1, "b": 0.5, "c": True, "d": "x=y", "e": None}


def command(folder, *more):
    words = ["--methods", "none,random,divprune", "--ratios", "0.25,0.1", "--limit", "8", "--out", folder, *more]
    return [sys.executable, "-m", "tokprune", "eval", *map(str, words)]


@pytest.mark.slow
def test_killed_on_the_demo_and_started_again(tmp_path):
    """The real thing: SIGKILL after the second cell, then the same results.json as undisturbed, byte for byte."""
    pytest.importorskip("lmms_eval")
    folder = tmp_path / "run"  # one folder after the other: its name stands in the command
    process = subprocess.Popen(
        command("run"), cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 900
    while len(list(folder.glob("cells/*/result.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = len(list(folder.glob("cells/*/result.json")))
    assert 2 <= finished < 5
    assert not (folder / "results.json").exists()
    subprocess.run(command("run"), cwd=tmp_path, env=ONE_THREAD, check=True, capture_output=True)
    resumed = (folder / "results.json").read_bytes()
    folder.rename(tmp_path / "first")
    subprocess.run(command("run"), cwd=tmp_path, env=ONE_THREAD, check=True, capture_output=True)
    assert (folder / "results.json").read_bytes() == resumed
    data = json.loads(resumed)
    assert [len(c["samples"]) for c in data["cells"]] == [8] * 5
    kept = {(c["method"], c["ratio"]): c["costs"]["visual_tokens_kept"] for c in data["cells"]}
    assert kept == {
        ("none", 1.0): 256,
        ("random", 0.25): 64,
        ("random", 0.1): 26,
        ("divprune", 0.25): 64,
        ("divprune", 0.1): 26,
    }


@pytest.mark.slow
def test_two_processes_find_the_same(tmp_path):
    """torchrun with two gloo processes: the cells of one process, question by question, also where one rank has
    fewer."""
    pytest.importorskip("lmms_eval")
    words = ["--methods", "none,divprune", "--ratios", "0.1", "--limit", "7"]
    environment = {**ONE_THREAD, "ACCELERATE_USE_CPU": "true"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29517",
        "-m",
        "tokprune",
    ]
    subprocess.run(
        [*launch, "eval", *words, "--out", str(tmp_path / "two")],
        env=environment,
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    subprocess.run(
        [sys.executable, "-m", "tokprune", "eval", *words, "--out", str(tmp_path / "one")],
        env=environment,
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    two, one = (json.loads((tmp_path / n / "results.json").read_text())["cells"] for n in ("two", "one"))
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert [(s["doc_id"], s["answer"], s["scores"]) for s in a["samples"]] == [
            (s["doc_id"], s["answer"], s["scores"]) for s in b["samples"]
        ]
        assert a["metrics"] == b["metrics"]
        assert len(a["samples"]) == 7


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PICTURES = """from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


@pytest.mark.slow
def test_broken_rows_name_themselves_and_other_cells_go_on(tmp_path):
    """Own tasks: one is whole, one has a row without a picture, one names a file that is not there."""
    pytest.importorskip("lmms_eval")
    picture = str(ROOT / "docs" / "images" / "scene.png")
    rows = [{"image": picture, "question": "what color is the circle ?", "answer": "pink"} for _ in range(3)]
    broken = {"whole": picture, "bare": None, "lost": str(tmp_path / "lost.png")}
    (tmp_path / "pictures.py").write_text(PICTURES)
    for name, image in broken.items():
        lines = [json.dumps({**row, "image": image if i == 1 else row["image"]}) for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=f"own_{name}", rows=f"{name}.jsonl"))
    tasks = ",".join(f"own_{name}" for name in ("bare", "lost", "whole"))
    words = ["--tasks", tasks, "--include-path", str(tmp_path), "--methods", "none", "--out", str(tmp_path / "out")]
    start = [sys.executable, "-m", "tokprune", "eval"]
    environment = {**ONE_THREAD, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([*start, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(c["task"], c["metrics"]["exact_match"]) for c in data["cells"]] == [("own_whole", 1.0)]
    reasons = {f["task"]: f["reason"] for f in data["failed"]}
    assert "doc_id 1" in reasons["own_bare"]
    assert "doc_id 1" in reasons["own_lost"]
    assert "lost.png" in reasons["own_lost"]
    assert "2 of 3 cells failed" in done.stderr
    wrong = subprocess.run(
        [*start, "--tasks", "tokprune_scene", "--out", str(tmp_path / "b")], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "tokprune_scenes" in wrong.stderr
    assert "Traceback" not in wrong.stderr
