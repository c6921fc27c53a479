"""`tokprune recommend`: the fastest setting within a loss, its interval, and a config that can be loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tokprune
import tokprune.demo
from tokprune.cli.app import app
from tokprune.cli.recommend import milliseconds, share
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, CellResult, Sample, SweepSettings
from tokprune.evaluation.own_pictures import read_questions
from tokprune.evaluation.recommend import advise, lines, search, tried
from tokprune.evaluation.significance import paired_shares
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import TTFT

run = CliRunner().invoke


# -- the interval ------------------------------------------------------------------------------------------------------


def test_the_interval_is_tangos() -> None:
    """Airway hyperresponsiveness before and after a transplant: 1 and 7 of 21 changed, as Fagerland, Lydersen and Laake
    (Statistics in Medicine 33, 2014, 2850-2875) print it; and the closed form where nothing changed."""
    low, high = paired_shares(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    z2 = 1.959963984540054**2
    for n in (1, 7, 100):
        assert paired_shares(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-5)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(60, [0.08, 0.03, 0.89], size=2000)
    hit = [low <= 0.05 <= high for w, b, _ in draws.tolist() for low, high in [paired_shares(w, b, 60)]]
    assert 0.93 <= np.mean(hit) <= 0.985


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(OptionError, match="cannot be"):
        paired_shares(3, 3, 5)


# -- choosing ----------------------------------------------------------------------------------------------------------


def result(method: str, ratio: float, right: int, ms: float | None = 10.0, n: int = 400) -> CellResult:
    """`right` of n questions answered right, the first ones."""
    samples = tuple(Sample("t", i, "", "", {"right": float(i < right)}) for i in range(n))
    timing = {} if ms is None else {TTFT: ms}
    return CellResult(Cell("t", method, ratio), {"right": right / n}, "right", samples, timing=timing)


def sweep(*results: CellResult) -> Sweep:
    return Sweep(SweepSettings("demo"), {}, [result("none", 1.0, 400, 20.0), *results])


def test_the_fastest_within_the_loss_wins_and_a_proven_one_before_one_that_only_seems_so() -> None:
    slow, fast, faster = result("a", 0.5, 400, 12), result("b", 0.25, 400, 8), result("c", 0.1, 360, 2)
    made = advise(sweep(slow, fast, faster), {}, 0.05)
    assert made.best is not None
    assert (made.best.method, made.proven) == ("b", True)
    made = advise(sweep(slow, fast, faster), {}, 0.11)  # c loses 10 %, but its interval reaches beyond 11
    assert made.best.method == "b"
    made = advise(sweep(faster), {}, 0.11)
    assert (made.best.method, made.proven) == ("c", False)
    assert "cannot prove it" in lines(made)[1]


def test_times_that_are_alike_are_told_apart_by_what_is_lost() -> None:
    made = advise(sweep(result("a", 0.1, 398, 10.0), result("b", 0.5, 400, 10.3)), {}, 0.05)
    assert made.best.method == "b"


def test_with_a_time_to_meet_the_least_loss_wins() -> None:
    cells = result("a", 0.5, 400, 12), result("b", 0.25, 399, 8), result("c", 0.1, 396, 2)
    assert advise(sweep(*cells), {}, 0.05, latency_ms=9).best.method == "b"
    assert advise(sweep(*cells), {}, 0.05, latency_ms=3).best.method == "c"
    none = advise(sweep(*cells), {}, 0.05, latency_ms=1)
    assert none.best is None
    assert "within 1 ms" in lines(none)[0]


def test_nothing_within_the_loss_is_said_with_the_nearest() -> None:
    made = advise(sweep(result("a", 0.5, 200)), {}, 0.01)
    assert made.best is None
    assert "a at 0.5: 50.0 %" in lines(made)[1]


def test_few_questions_prove_nothing_even_without_a_loss() -> None:
    """A bootstrap of five right answers has no width; five questions do not prove a loss below 1 %."""
    base, other = result("none", 1.0, 5, n=5), result("a", 0.5, 5, n=5)
    made = advise(Sweep(SweepSettings("demo"), {}, [base, other]), {}, 0.01)
    assert (made.best.method, made.proven) == ("a", False)
    need = made.best.questions_needed(0.01, 0.95)
    assert need is not None
    assert paired_shares(0, 0, need)[1] <= 0.01 < paired_shares(0, 0, int(need / 1.2))[1]


def test_a_metric_that_is_no_share_is_lost_relative_to_the_unpruned_score() -> None:
    def of(method: str, score: float) -> CellResult:
        samples = tuple(Sample("t", i, "", "", {"cider": score + i % 2}) for i in range(50))
        return CellResult(Cell("t", method, 0.5), {"cider": score + 0.5}, "cider", samples)

    found = tried(of("none", 9.5), of("a", 8.5), 0.95)
    assert found.loss == pytest.approx(0.1)
    assert found.low <= found.loss <= found.high


def test_a_method_that_is_surely_past_the_loss_is_not_tried_further() -> None:
    asked: list[Cell] = []
    right = {("none", 1.0): 400, ("bad", 0.5): 100, ("good", 0.5): 400, ("good", 0.1): 390}

    def cells(part: Sequence[Cell]) -> Sweep:
        asked.extend(part)
        return Sweep(SweepSettings("demo"), {}, [result(c.method, c.ratio, right[c.method, c.ratio]) for c in part])

    found, skipped = search(cells, "t", ["bad", "good"], [0.1, 0.5], 0.02)
    assert [(c.method, c.ratio) for c in asked] == [("none", 1.0), ("bad", 0.5), ("good", 0.5), ("good", 0.1)]
    assert list(skipped) == ["bad 0.1"]
    assert len(found.results) == 4


# -- questions and options ---------------------------------------------------------------------------------------------


def test_questions_of_a_folder(tmp_path: Path) -> None:
    scene = tokprune.demo.held_out(1)[0].image
    for name in ("b10.png", "b9.png"):
        scene.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    assert [q.picture.name for q in read_questions(tmp_path, ["q ?"])] == ["b9.png", "b10.png"]
    assert len(read_questions(tmp_path, ["q ?", "r ?"], limit=3)) == 3
    (tmp_path / "questions.csv").write_text("image,question,answer\nb9.png,what ?,red\nb9.png,and ?,\n")
    assert [(q.text, q.answer) for q in read_questions(tmp_path, ["q ?"])] == [("what ?", "red"), ("and ?", "")]
    for rows, said in (
        ([{"image": "b9.png"}], "row 1"),
        ([{"image": "no.png", "question": "q"}], "no.png"),
        ({}, "list"),
    ):
        (tmp_path / "questions.json").write_text(json.dumps(rows))
        with pytest.raises(OptionError, match=said):
            read_questions(tmp_path, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="no pictures"):
        read_questions(tmp_path / "empty", ["q"])


def test_amounts() -> None:
    assert (share("1%"), share("0.02"), share("5 %")) == (0.01, 0.02, 0.05)
    assert (milliseconds("200ms"), milliseconds("0.2s")) == (200, 200)
    for text in ("3", "x", "1.2.3%", "-1%"):
        with pytest.raises(OptionError, match="--max-loss"):
            share(text)
    for text in ("200", "0ms", "fast"):
        with pytest.raises(OptionError, match="--latency"):
            milliseconds(text)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for i, e in enumerate(tokprune.demo.held_out(4)):
        e.image.save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": e.question, "answer": e.answer})
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


def test_on_the_demo_and_once_more_from_where_it_stopped(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "recommend",
        "--images",
        str(pictures),
        "--max-loss",
        "60%",
        "--out",
        str(out),
        "--methods",
        "divprune,merge",
    ]
    result = run(app, [*words, "--ratios", "0.5"])
    assert result.exit_code == 0, (result.output, result.exception)
    config = tokprune.PruneConfig.load(out / "prune.json")
    made = json.loads((out / "recommend.json").read_text())
    assert config.methods[0].info.name == made["best"]["method"]
    assert config.ratio == made["best"]["ratio"]
    assert {t["method"] for t in made["tried"]} == {"divprune", "merge"}
    assert all(t["kept"] == 256 * t["ratio"] and t["kl"] > 0 for t in made["tried"])
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/result.json")}
    assert len(stamps) == 3
    result = run(app, [*words, "--ratios", "0.5,0.25"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps  # read, not run again
    assert len(list(out.glob("cells/*/result.json"))) == 5


def test_without_answers_agreement_counts(pictures: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
    out = tmp_path / "out"
    words = [
        "--max-loss",
        "0%",
        "--methods",
        "none,divprune",
        "--ratios",
        "1",
        "--question",
        "what color is the circle ?",
    ]
    result = run(app, ["recommend", "--images", str(tmp_path), "--out", str(out), *words, "--latency", "1s"])
    made = json.loads((out / "recommend.json").read_text())
    assert made["metric"] == "agreement"
    assert made["tried"][0]["loss"] == 0  # at ratio 1 nothing changes
    assert made["tried"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of them"),
        (["--images", "nope"], "no folder"),
        (["--images", "x", "--tasks", "y"], "one of them"),
        (["--images", "x", "--methods", "divprun"], "divprune"),
    ],
)
def test_wrong_options(words: list[str], said: str) -> None:
    error = run(app, ["recommend", *words]).exception
    assert isinstance(error, OptionError)
    assert said in str(error)
