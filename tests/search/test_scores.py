"""Scores on the demo VLM, searches by them, and the command: what is found is what `apply` then does."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tokprune
import tokprune.demo
from tokprune.cli.app import app
from tokprune.config import PruneConfig
from tokprune.demo.asking import Asker
from tokprune.demo.sweep import is_right
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, CellResult, Sample
from tokprune.profiling.formulas import DecoderShape, layer_tokens, prefill_share
from tokprune.schedule import Schedule
from tokprune.search.run import SearchGoal, search
from tokprune.search.scores import ModelScore, droppable_layers, scheduled
from tokprune.search.strategies import Trials
from tokprune.search.tasks import TaskScore
from tokprune.testing import build

ROOT = Path(__file__).parents[2]
HALF = Schedule(((1, 0.5), (3, 0.1)))


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker(*tokprune.demo.load())


@pytest.fixture(scope="module")
def examples():  # type: ignore[no-untyped-def]
    return tokprune.demo.held_out(14, seed=1)


def score_of(asker: Asker, examples, kind: str) -> ModelScore:  # type: ignore[no-untyped-def]
    batches = [asker.inputs(examples[:7]), asker.inputs(examples[7:])]
    right = lambda i, text: is_right(text, examples[i].answer)  # noqa: E731
    return ModelScore(asker.model, asker.processor, "fastv", batches, kind, right, asker.new_tokens)


def answers(asker: Asker, examples) -> list[str]:  # type: ignore[no-untyped-def]
    return asker.answers(asker.inputs(examples[:7])) + asker.answers(asker.inputs(examples[7:]))


@pytest.mark.parametrize("kind", ["agreement", "accuracy", "kl"])
def test_a_score_is_what_the_pruned_model_does(asker: Asker, examples, kind: str) -> None:  # type: ignore[no-untyped-def]
    score = score_of(asker, examples, kind)
    whole = answers(asker, examples)
    right = [is_right(a, e.answer) for a, e in zip(whole, examples, strict=True)]
    assert score(None) == {"agreement": 1.0, "accuracy": sum(right) / 14, "kl": 0.0}[kind]
    with tokprune.apply(asker.model, "fastv", schedule=HALF.steps), torch.no_grad():
        pruned = answers(asker, examples)
        rows = [asker.model(**inputs).logits[:, -1].log_softmax(-1) for inputs in score.batches]
    with torch.no_grad():
        plain = [asker.model(**inputs).logits[:, -1].log_softmax(-1) for inputs in score.batches]
    if kind == "kl":
        p, w = torch.cat(rows), torch.cat(plain)
        expected = -torch.nn.functional.kl_div(w, p.exp(), reduction="batchmean")
        assert score(HALF) == pytest.approx(float(expected), abs=1e-5)
        assert score(HALF) < 0
    elif kind == "agreement":
        assert score(HALF) == sum(a == b for a, b in zip(pruned, whole, strict=True)) / 14
    else:
        assert score(HALF) == sum(is_right(a, e.answer) for a, e in zip(pruned, examples, strict=True)) / 14
    assert not hasattr(asker.model, "_tokprune")
    assert score.tokens[0] == 256


def test_what_cannot_be_scored_is_refused(asker: Asker) -> None:
    batch = [{}]
    with pytest.raises(OptionError, match="belongs to the stage 'connector'"):
        ModelScore(asker.model, asker.processor, "divprune", batch)
    with pytest.raises(OptionError, match="needs right="):
        ModelScore(asker.model, asker.processor, "fastv", batch, "accuracy")
    with pytest.raises(OptionError, match="Allowed: accuracy, agreement, kl"):
        ModelScore(asker.model, asker.processor, "fastv", batch, "loss")
    with pytest.raises(OptionError, match="no questions"):
        ModelScore(asker.model, asker.processor, "fastv", [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--min-accuracy 0.98"),
        ({"floor": 0.9, "max_flops": 2.0}, "in \\(0, 1\\]"),
        ({"floor": 0.9, "strategy": "grid"}, "Allowed: greedy, sigmoid, withdraw"),
        ({"floor": 0.9, "strategy": "sigmoid"}, "--max-flops 0.5"),
        ({"max_flops": 0.5, "strategy": "greedy"}, "give --min-accuracy alone"),
    ],
)
def test_wishes_that_do_not_fit_are_refused(given, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=message):
        SearchGoal(**given)


@pytest.mark.parametrize("strategy", ["greedy", "sigmoid", "withdraw"])
def test_a_search_on_the_demo_model(asker: Asker, examples, strategy: str) -> None:  # type: ignore[no-untyped-def]
    kind = "kl" if strategy == "withdraw" else "agreement"
    score = score_of(asker, examples, kind)
    wanted = {
        "greedy": SearchGoal(floor=0.8, step=1 / 4),
        "sigmoid": SearchGoal(max_flops=0.5, trials=Trials(4, "random")),
        "withdraw": SearchGoal(floor=-0.5, strategy="withdraw"),
    }[strategy]
    layers = droppable_layers(asker.model)
    assert layers == [1, 2, 3]
    shape = DecoderShape.of(asker.model.config)
    calls: list[Schedule | None] = []

    def counted(schedule: Schedule | None) -> float:
        calls.append(schedule)
        return score(schedule)

    found = search(counted, layers, wanted, shape, score.tokens)
    assert len(calls) <= wanted.evaluations(3)
    assert found.fits
    assert found.found.schedule is not None
    assert score(found.found.schedule) == pytest.approx(found.found.score)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["visual_tokens_per_layer"] == layer_tokens(found.found.schedule, 256, 4)
    assert 0 < data["flops_share"] < 1
    if wanted.max_flops is not None:
        assert data["flops_share"] <= 0.5


def test_the_recorded_greedy_search_is_twice_as_fast_without_loss(asker: Asker) -> None:
    """G-Search's claim, on questions that the search did not see: more than 2x fewer FLOPs, and the same answers."""
    data = json.loads((ROOT / "benchmarks" / "results" / "search_greedy.json").read_text(encoding="utf-8"))
    schedule = Schedule(tuple((layer, share) for layer, share in data["schedule"]))
    share = prefill_share(schedule, DecoderShape.of(asker.model.config), data["visual_tokens"], data["other_tokens"])
    assert share == pytest.approx(data["flops_share"])
    assert 1 / share > 2
    unseen = tokprune.demo.held_out(28, seed=3)
    score = ModelScore(
        asker.model, asker.processor, "fastv", [asker.inputs(unseen)], "agreement", None, asker.new_tokens
    )
    assert score(schedule) >= 27 / 28


def test_deepstack_planes_come_first() -> None:
    assert droppable_layers(build("qwen3_vl", layers=6).model)[0] == len(
        build("qwen3_vl").model.config.vision_config.deepstack_visual_indexes
    )


def test_the_command_writes_a_config_that_apply_takes_and_goes_on(tmp_path: Path, asker: Asker, examples) -> None:  # type: ignore[no-untyped-def]
    out, data = tmp_path / "found.json", tmp_path / "numbers.json"
    line = ["search", "--min-accuracy", "0.85", "--questions", "14", "--out", str(out), "--json", str(data), "-q"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    numbers = json.loads(data.read_text())
    journal = out.with_suffix(".scores.jsonl").read_text().splitlines()
    assert len(journal) == 1 + numbers["evaluations"]
    config = PruneConfig.load(out)
    assert [list(step) for step in config.methods[0].schedule] == numbers["schedule"]
    whole = answers(asker, examples)
    with tokprune.apply(asker.model, config):
        same = [a == b for a, b in zip(answers(asker, examples), whole, strict=True)]
    assert sum(same) / 14 == numbers["score"] >= 0.85
    again = CliRunner().invoke(app, [*line[:-1]])
    assert again.exit_code == 0
    assert f"{numbers['evaluations']} schedules are scored already" in again.output
    assert "of the LLM's prefill FLOPs" in " ".join(again.output.split())
    assert out.with_suffix(".scores.jsonl").read_text().splitlines() == journal
    other = CliRunner().invoke(app, [*line, "--score", "accuracy"])
    assert isinstance(other.exception, OptionError)
    assert "another search" in str(other.exception)


@dataclass
class FakeHarness:
    """A harness whose answers depend on the share of tokens."""

    configs: list[PruneConfig | None] = field(default_factory=list)

    def __call__(self, cell: Cell, config: PruneConfig | None = None) -> CellResult:
        self.configs.append(config)
        good = 4 if config is None else round(4 * config.methods[0].schedule[-1][1])
        samples = tuple(Sample(cell.task, i, "yes" if i < good else "no", "yes", {}) for i in range(4))
        lower = cell.task == "errors"
        value = 1 / good if lower else good / 4
        costs = {"visual_tokens_total": 100.0, "prompt_tokens": 130.0}
        return CellResult(cell, {"m": value}, "m", samples, not lower, costs)


def test_tasks_of_the_harness_are_scored_against_the_whole_model() -> None:
    harness = FakeHarness()
    accuracy = TaskScore(harness, "fastv", ("right", "errors"))
    half = Schedule(((2, 0.5),))
    assert accuracy(None) == 1.0
    assert accuracy(half) == pytest.approx((0.5 + 0.5) / 2)
    assert harness.configs == [None, None, scheduled("fastv", half), scheduled("fastv", half)]
    agreement = TaskScore(FakeHarness(), "fastv", ("right",), "agreement")
    assert agreement(half) == 0.5
    assert agreement.tokens == (100, 30)
    with pytest.raises(OptionError, match="Allowed: accuracy, agreement"):
        TaskScore(harness, "fastv", ("right",), "kl")
