"""`--config FILE`: what `PruneConfig.save` wrote decides in run, profile and eval, and nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tokprune
from tokprune.cli.app import app
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, SweepSettings, build_methods, config_cells, config_of, key, plan

run = CliRunner().invoke
SCENE = Path(__file__).parent.parent.parent / "docs" / "images" / "scene.png"
ASK = ["run", "--image", str(SCENE), "--question", "what color is the circle ?"]
WRAPPED = tokprune.get_method("merge", method=tokprune.get_method("hired", alpha=0.7))


@pytest.fixture
def file(tmp_path: Path) -> str:
    tokprune.PruneConfig.build(WRAPPED, ratio=0.2, positions="keep").save(tmp_path / "prune.json")
    return str(tmp_path / "prune.json")


def test_run(file: str, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    result = run(app, [*ASK, "--config", file, "--json", str(out)])
    assert result.exception is None, result.exception
    report = json.loads(out.read_text())["report"]
    assert report["methods"] == ["merge(hired)"]
    assert (report["kept"], report["positions"]) == (51, "keep")


def test_profile(file: str, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    few = ["--repeats", "1", "--new-tokens", "2", "--json", str(out), "-q"]
    result = run(app, ["profile", "--config", file, *few])
    assert result.exception is None, result.exception
    cells = json.loads(out.read_text())["cells"]
    assert [c["name"] for c in cells if c["kind"] == "pruned"] == ["merge(hired) 0.2"]


def test_eval_asks_for_the_cells_of_the_config(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("tokprune.cli.eval_run.run", lambda request: asked.append(request) or 0)
    result = run(app, ["eval", "--config", file])
    assert result.exit_code == 0, result.exception
    (request,) = asked
    assert [(c.method, c.ratio) for c in request.cells] == [("none", 1.0), ("merge(hired)", 0.2)]
    assert build_methods("merge(hired)", request.settings) == (WRAPPED,)
    assert request.settings.positions == "keep"


def test_cells_of_a_config_keep_the_keys_of_all_others() -> None:
    """A results folder made without configs goes on being read."""
    cells = plan(["a", "b"], ["none", "divprune"], [0.2])
    more, settings = config_cells(cells, tokprune.PruneConfig.build("divprune", ratio=0.2), SweepSettings("demo"))
    configs = settings.configs
    assert [c.task for c in more] == ["a", "b"]
    assert not {c.method for c in more} & {c.method for c in cells}
    assert "configs" not in SweepSettings("demo").to_dict()
    assert SweepSettings(**SweepSettings("demo", configs=configs).to_dict()).configs == configs
    cell = Cell("a", "divprune", 0.2)
    assert key(cell, SweepSettings("demo")) != key(cell, SweepSettings("demo", configs=configs))


def test_eval_takes_prompt_budgets_in_place_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("tokprune.cli.eval_run.run", lambda request: asked.append(request) or 0)
    words = ["eval", "--methods", "none,random", "--prompt-budget", "64,48", "--seed", "7"]
    assert run(app, words).exit_code == 0
    (request,) = asked
    assert [c.method for c in request.cells] == ["none", "random, prompts of 64", "random, prompts of 48"]
    configs = [config_of(cell, request.settings) for cell in request.cells[1:]]
    assert [(c.prompt_budget, c.ratio, c.methods[0].seed) for c in configs] == [(64, None, 7), (48, None, 7)]
    assert "prompt_budgets" not in SweepSettings("demo").to_dict()
    assert SweepSettings(**request.settings.to_dict()) == request.settings
    assert "no whole number" in str(run(app, ["eval", "--prompt-budget", "6x"]).exception)


def test_run_and_plan_take_a_prompt_budget(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    result = run(app, [*ASK, "--prompt-budget", "60", "--json", str(out), "-q"])
    assert result.exception is None, result.exception
    report = json.loads(out.read_text())["report"]
    assert (report["physical_tokens"], report["asked"]) == (60, "at most 60 tokens a prompt")
    assert report["prompts"][0]["text"] + report["kept"] == 60
    words = ["plan", "--preset", "llava-1.5-7b", "--gpu", "a100", "--text", "64", "--prompt-budget"]
    result = run(app, [*words, "208", "--json", str(out), "-q"])
    assert result.exception is None, result.exception
    assert 0.25 in [row["ratio"] for row in json.loads(out.read_text())["rows"]]
    assert "no picture" in str(run(app, [*words, "64"]).exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*ASK, "--ratio", "0.1"], "--ratio"),
        ([*ASK, "--method", "hired"], "--method"),
        ([*ASK, "--positions", "compact"], "--positions"),
        (["profile", "--methods", "hired"], "--methods"),
        (["eval", "--positions", "compact"], "--positions"),
    ],
)
def test_what_the_file_says_is_not_said_twice(words: list[str], said: str, file: str) -> None:
    error = run(app, [*words, "--config", file]).exception
    assert isinstance(error, OptionError)
    assert f"--config already says what {said} says" in str(error)


@pytest.mark.parametrize("command", ["profile", "eval"])
def test_a_budget_is_no_ratio_to_compare(command: str, tmp_path: Path) -> None:
    tokprune.PruneConfig.build("divprune", budget=20).save(tmp_path / "b.json")
    error = run(app, [command, "--config", str(tmp_path / "b.json")]).exception
    assert isinstance(error, OptionError)
    assert "a budget of 20 tokens" in str(error)


@pytest.mark.slow
def test_eval_end_to_end(file: str, tmp_path: Path) -> None:
    few = ["--limit", "7", "--batch-size", "7", "--out", str(tmp_path / "ev")]
    result = run(app, ["eval", "--config", file, *few])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "ev" / "results.json").read_text())
    assert data["methods"]["merge(hired)"][0]["options"]["method"]["options"]["alpha"] == 0.7
    assert data["cells"][1]["costs"]["visual_tokens_kept"] == 51
