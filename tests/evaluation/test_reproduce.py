"""`tokprune reproduce`: published tables as recipes, tested up to the download, and in full on the demo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokprune.cli.app import app
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, CellResult, Sample, SweepSettings, build_methods
from tokprune.evaluation.errors import Failure
from tokprune.evaluation.reference.tables import Benchmark, models
from tokprune.evaluation.reproduce import (
    AGREES,
    DIFFERS,
    NOT_RUN,
    UNDECIDED,
    Recipe,
    RecipeRow,
    find,
    interval,
    outcomes,
    recipes,
    verdict,
    wilson,
)
from tokprune.evaluation.sweep import Sweep
from tokprune.registry import list_methods

run = CliRunner().invoke
RUNNABLE = [name for name, recipe in recipes().items() if not recipe.missing]


def test_the_headline_tables_are_there() -> None:
    """DivPrune, HiRED, VisionZip and FastV run; ToMe and QuoTA say why they do not."""
    assert {"demo", "divprune", "hired", "visionzip", "fastv"} <= set(RUNNABLE)
    for name, word in (("tome", "ImageNet"), ("quota", "budget"), ("catp", "examples")):
        with pytest.raises(OptionError, match=f"cannot be run: .*{word}"):
            find(name)


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_recipe_is_complete(name: str) -> None:
    """Methods can be built with their options, tasks and numbers are there, and the baseline is one of the rows or
    there is none in the source."""
    recipe = find(name)
    settings = SweepSettings(recipe.checkpoint, model_args=recipe.options(), **recipe.settings)
    cells = recipe.cells()
    assert cells
    for cell in cells:
        assert cell.method in list_methods()
        build_methods(cell.method, settings)
        assert 0 < cell.ratio <= 1
    assert all(b.task and b.metrics for b in recipe.benchmarks)
    assert all(len(row.values) == len(recipe.benchmarks) for row in recipe.rows)
    assert any(row.method != "none" for row in recipe.rows)
    assert recipe.source


def test_numbers_are_those_of_the_reference_tables() -> None:
    table = next(t for t in models()["llava-1.5-7b"].tables if t.id == "divprune")
    recipe = find("divprune")
    (row,) = [r for r in recipe.rows if r.method == "divprune"]
    assert row.ratio == pytest.approx(56 / 576)
    (entry,) = [e for e in table.entries if e.method == "divprune"]
    assert set(row.values) <= set(entry.values)
    fastv = find("fastv")
    assert fastv.options() == {"option.fastv.layer": 3}


def test_methods_inside_the_llm_are_not_run_by_a_number_that_means_something_else() -> None:
    """Papers count their tokens as averages over layers, or behind layer 2; only spelled-out rows are run."""
    for recipe in recipes().values():
        for row in recipe.rows:
            if row.method in list_methods("decoder"):
                assert row.options, (recipe.name, row.label)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_verdicts() -> None:
    assert verdict(60.0, 60.9) == AGREES
    assert verdict(60.0, 61.1) == DIFFERS
    assert verdict(1500.0, 1512.0) == AGREES  # 1 % of large numbers
    assert verdict(60.0, 60.0, (40.0, 80.0)) == UNDECIDED  # twenty questions confirm nothing
    assert verdict(60.0, 60.2, (59.5, 60.9)) == AGREES
    assert verdict(60.0, 70.0, (65.0, 75.0)) == DIFFERS
    assert verdict(60.0, 60.0, (None, None)) == UNDECIDED


def test_wilson() -> None:
    """81 of 263, as Newcombe prints it (Statistics in Medicine 17, 1998, 857-872)."""
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def result(method: str, ratio: float, right: int, n: int = 100) -> CellResult:
    samples = tuple(Sample("t", i, "", "", {"acc": float(i < right)}) for i in range(n))
    return CellResult(Cell("t", method, ratio), {"acc": right / n}, "acc", samples)


RECIPE = Recipe(
    "x",
    "",
    "m",
    "s",
    benchmarks=(Benchmark("B", "t", ("acc",), 100), Benchmark("C", "other", ("acc",), 100)),
    rows=(RecipeRow("all tokens", "none", 1.0, (80.0, 50.0)), RecipeRow("A", "divprune", 0.1, (70.0, None))),
)


def test_measured_beside_published() -> None:
    found = outcomes(RECIPE, Sweep(SweepSettings("m"), {}, [result("none", 1.0, 80), result("divprune", 0.1, 60)]))
    assert [(o.label, o.published, o.ours, o.verdict) for o in found] == [
        ("all tokens at 1", 80.0, 80.0, AGREES),
        ("A at 0.1", 70.0, 60.0, DIFFERS),
    ]
    low, high = interval(RECIPE.benchmarks[0], result("none", 1.0, 80))
    assert low is not None
    assert low < 80 < high


def test_what_failed_or_gave_no_number_is_not_run() -> None:
    failed = [Failure(Cell("t", "divprune", 0.1), "ValueError", "no picture")]
    found = outcomes(RECIPE, Sweep(SweepSettings("m"), {}, [result("none", 1.0, 80)], failed))
    assert (found[1].verdict, found[1].why) == (NOT_RUN, "no picture")


def test_a_part_of_the_questions_confirms_nothing() -> None:
    found = outcomes(RECIPE, Sweep(SweepSettings("m", limit=100), {}, [result("none", 1.0, 80)]))
    assert found[0].verdict == UNDECIDED


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_list_says_what_runs_and_why_the_rest_does_not() -> None:
    out = run(app, ["reproduce"], env={"COLUMNS": "200"}).output
    assert "divprune-next" in out
    assert re.search(r"not run: tome: needs ImageNet", out)


def test_up_to_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    result = run(app, ["reproduce", "divprune", "--tasks", "gqa", "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, OptionError)
    assert "hf download llava-hf/llava-1.5-7b-hf" in str(result.exception)
    assert "none at 1, divprune at 0.09722; on gqa; 2 cells" in result.output


def test_a_dry_run_runs_nothing(tmp_path: Path) -> None:
    result = run(app, ["reproduce", "visionzip", "--dry-run", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "visionzip at 0.2222" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["divprun"], "divprune"), (["divprune", "--tasks", "gqaa"], "it has gqa"), (["tome"], "ImageNet")],
)
def test_wrong_names(words: list[str], said: str) -> None:
    error = run(app, ["reproduce", *words]).exception
    assert isinstance(error, OptionError)
    assert said in str(error)


@pytest.mark.slow
def test_the_demo_in_full(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    words = ["reproduce", "demo", "--out", str(tmp_path / "out"), "--json", str(out)]
    result = run(app, words)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [r["verdict"] for r in rows] == [AGREES] * 5
    assert all(r["questions"] == 210 for r in rows)
