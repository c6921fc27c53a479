"""The searches on scores that are known in full: against exhaustive search, budgets to the letter, and resuming."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable

import pytest

from tokprune.errors import MissingExtraError, OptionError, install_line
from tokprune.profiling.formulas import DecoderShape, prefill_share
from tokprune.schedule import Schedule
from tokprune.search.journal import Journal
from tokprune.search.strategies import Found, Sigmoid, Trials, greedy, of_shares, sigmoid, withdrawal

LAYERS = (1, 2, 3, 4, 5)
SHAPE = DecoderShape(6, 64, 4, 4, 16, 128, 96)
Score = Callable[[Schedule | None], float]


def cost(schedule: Schedule | None) -> float:
    return 1.0 if schedule is None else prefill_share(schedule, SHAPE, 100, 10)


def needs(*shares: float) -> Score:
    """A model that answers alike as long as each layer of LAYERS has its share; every lack costs."""

    def score(schedule: Schedule | None) -> float:
        given = [1.0 if schedule is None else schedule.share(at) for at in LAYERS]
        return 1 - sum(max(0.0, need - share) for need, share in zip(shares, given, strict=True))

    return score


class Counted:
    """A score that counts its calls."""

    def __init__(self, score: Score) -> None:
        self.score, self.calls = score, 0

    def __call__(self, schedule: Schedule | None) -> float:
        self.calls += 1
        return self.score(schedule)


def exhaustive(score: Score, layers: tuple[int, ...], floor: float, parts: int) -> Schedule | None:
    """The cheapest of all schedules with shares in `parts` that reach the floor."""
    falling = itertools.combinations_with_replacement(range(parts, -1, -1), len(layers))
    passing = [s for c in falling if score(s := of_shares(layers, [n / parts for n in c])) >= floor]
    return min(passing, key=cost)


def test_steps_are_those_layers_that_drop() -> None:
    assert of_shares((1, 2, 3), (1.0, 0.5, 0.5)) == Schedule(((2, 0.5),))
    assert of_shares((1, 2), (1.0, 1.0)) is None


@pytest.mark.parametrize("shares", [(1, 0.75, 0.5, 0.25, 0), (0.5, 0.5, 0.5, 0.25, 0.25), (1, 1, 1, 1, 1), (0,) * 5])
def test_greedy_finds_what_exhaustive_search_finds(shares: tuple[float, ...]) -> None:
    score = needs(*shares)
    found = greedy(score, LAYERS, floor=1.0, step=1 / 4)
    assert found.schedule == exhaustive(score, LAYERS, 1.0, 4) == of_shares(LAYERS, shares)
    assert found.score == 1.0


def test_greedy_takes_a_handful_of_scores_per_layer_and_returns_one_that_was_scored() -> None:
    score = Counted(needs(0.9, 0.7, 0.4, 0.2, 0.1))
    journal = Journal()
    found = greedy(journal.remembering(score), LAYERS, floor=0.97)
    assert score.calls <= 1 + 6 * len(LAYERS)
    assert found.schedule is not None
    assert journal.known[found.schedule.steps] == found.score >= 0.97
    finer = [max(0.0, found.schedule.share(at) - 1 / 32) for at in LAYERS]
    assert score(of_shares(LAYERS, finer)) < 0.97


def test_a_floor_above_the_whole_model_is_refused() -> None:
    with pytest.raises(OptionError, match=r"whole model scores 1, below the 1\.1"):
        greedy(needs(1, 1, 1, 1, 1), LAYERS, floor=1.1)


def test_withdrawal_is_the_first_layer_where_all_can_go() -> None:
    assert withdrawal(needs(1, 1, 0.002, 0, 0), LAYERS, 1 - 0.003) == Found(Schedule(((3, 0.0),)), pytest.approx(0.998))
    assert withdrawal(needs(1, 1, 1, 1, 1), LAYERS, 0.99).schedule is None


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.81])
@pytest.mark.parametrize("shape", [(0.1, 0.0, 1.0), (1.5, 0.1, 0.9), (16.0, 0.1, 1.0), (3.0, 0.15, 0.15)])
def test_a_sigmoid_spends_its_budget_and_no_more(budget: float, shape: tuple[float, float, float]) -> None:
    found = Sigmoid.within(budget, cost, LAYERS, shape)
    spent = cost(found.schedule(LAYERS))
    assert spent <= budget
    later = Sigmoid(shape[0], found.middle + 0.01, *shape[1:])
    assert cost(later.schedule(LAYERS)) > budget or found.share(LAYERS[-1]) == shape[2]
    shares = [found.share(at) for at in LAYERS]
    assert shares == sorted(shares, reverse=True)
    assert found.share(0) == pytest.approx(
        shape[1] + (shape[2] - shape[1]) / (1 + math.exp(-shape[0] * found.middle)), abs=5e-4
    )


@pytest.mark.parametrize("sampler", ["optuna", "random"])
def test_sigmoid_search_nears_the_best_of_its_family_and_keeps_the_budget(sampler: str) -> None:
    if sampler == "optuna":
        pytest.importorskip("optuna")
    score, budget = needs(0.9, 0.8, 0.3, 0.1, 0.1), 0.5
    grid = [
        Sigmoid.within(budget, cost, LAYERS, (a, low, 1.0)).schedule(LAYERS)
        for a in (0.3, 1, 2, 4, 8)
        for low in (0.0, 0.1, 0.2)
    ]
    found = sigmoid(score, LAYERS, cost, budget, Trials(30, sampler))
    assert found.schedule is not None
    assert cost(found.schedule) <= budget
    assert found.score == score(found.schedule) >= max(map(score, grid)) - 0.02
    again = sigmoid(score, LAYERS, cost, budget, Trials(30, sampler))
    assert again == found
    assert sigmoid(score, LAYERS, cost, budget, Trials(30, sampler, seed=1)).score == pytest.approx(
        found.score, abs=0.1
    )


def test_a_search_starts_at_the_fit_of_the_greedy_curve() -> None:
    curve = Sigmoid(2.0, 2.5, 0.125, 1.0).schedule(LAYERS)
    assert curve is not None
    near = Sigmoid.fit(curve, LAYERS).schedule(LAYERS)
    assert near is not None
    assert max(abs(near.share(at) - curve.share(at)) for at in LAYERS) < 0.1
    seen: list[Schedule | None] = []

    def score(schedule: Schedule | None) -> float:
        seen.append(schedule)
        return 0.0

    sigmoid(score, LAYERS, cost, 0.5, Trials(1, "random"), start=curve)
    fitted = Sigmoid.fit(curve, LAYERS)
    assert seen == [Sigmoid.within(0.5, cost, LAYERS, (fitted.steepness, fitted.low, fitted.high)).schedule(LAYERS)]


def test_of_equal_scores_the_cheapest_wins() -> None:
    found = sigmoid(lambda schedule: 1.0, LAYERS, cost, 0.9, Trials(20, "random"))
    tried: list[float] = []

    def score(schedule: Schedule | None) -> float:
        tried.append(cost(schedule))
        return 1.0

    sigmoid(score, LAYERS, cost, 0.9, Trials(20, "random"))
    assert found.schedule is not None
    assert cost(found.schedule) == min(tried)


def test_budgets_and_samplers_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(OptionError, match=r"cannot be met.*still 0\.2"):
        sigmoid(needs(0, 0, 0, 0, 0), LAYERS, cost, 0.01)
    with pytest.raises(OptionError, match="Allowed: optuna, random"):
        sigmoid(needs(0, 0, 0, 0, 0), LAYERS, cost, 0.5, Trials(sampler="grid"))
    assert sigmoid(needs(0, 0, 0, 0, 0), LAYERS, cost, 1.0).schedule is None


def test_without_optuna_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=re.escape(install_line("search"))):
        sigmoid(needs(0, 0, 0, 0, 0), LAYERS, cost, 0.5)


class Interrupted(Exception):
    """As Ctrl-C would."""


@pytest.mark.parametrize("sampler", ["optuna", "random", "greedy"])
def test_an_interrupted_search_goes_on_and_ends_as_the_whole_one(tmp_path, sampler: str) -> None:
    if sampler == "optuna":
        pytest.importorskip("optuna")

    def run(score: Score) -> Found:
        if sampler == "greedy":
            return greedy(score, LAYERS, 0.98)
        return sigmoid(score, LAYERS, cost, 0.5, Trials(12, sampler))

    truth = needs(0.9, 0.8, 0.3, 0.1, 0.1)
    whole = Counted(truth)
    expected = run(Journal().remembering(whole))
    path, first = tmp_path / "deep" / "scores.jsonl", Counted(truth)

    def failing(schedule: Schedule | None) -> float:
        if first.calls == whole.calls // 2:
            raise Interrupted
        return first(schedule)

    with pytest.raises(Interrupted):
        run(Journal(path, {"model": "a"}).remembering(failing))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"steps": [[1, 0.5')  # killed while it wrote
    journal, second = Journal(path, {"model": "a"}), Counted(truth)
    assert journal.remembered == first.calls
    assert run(journal.remembering(second)) == expected
    assert first.calls + second.calls == whole.calls
    with pytest.raises(OptionError, match=r"another search.*rm "):
        Journal(path, {"model": "b"})
