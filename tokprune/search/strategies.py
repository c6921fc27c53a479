"""Three searches over schedules, as functions of a score: from shallow to deep, along a sigmoid, where all can go.

They know no model: a score is any function of a schedule (None: nothing is dropped), higher is better, and a cost any
that rises with the shares. All are deterministic, so a search that was interrupted goes on where its scores are
remembered (`journal`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokprune.errors import OptionError, missing_extra, unknown
from tokprune.schedule import Schedule

Score = Callable[[Schedule | None], float]
"""What a schedule is worth; None stands for the whole model. Higher is better."""
Cost = Callable[[Schedule | None], float]
"""What a schedule costs, such as its share of the FLOPs; it never falls where shares rise."""

STEP = 1 / 32
"""Shares are told apart this finely: our choice, a thirty-second of the tokens."""
SAMPLERS = ("optuna", "random")


@dataclass(frozen=True)
class Found:
    """What a search ends with. schedule: None where nothing may be dropped."""

    schedule: Schedule | None
    score: float


def of_shares(layers: Sequence[int], shares: Sequence[float]) -> Schedule | None:
    """The schedule of one share per layer, without the layers that drop nothing; None where none drops.

    layers: ascending, those in front of which may be dropped. shares: never rising.
    """
    before = [1.0, *shares[:-1]]
    steps = [(at, now) for at, was, now in zip(layers, before, shares, strict=True) if now < was]
    return Schedule(tuple(steps)) if steps else None


def greedy(score: Score, layers: Sequence[int], floor: float, step: float = STEP) -> Found:
    """G-Search (CVPR 2025, arXiv 2412.00556): from shallow to deep, the smallest share of each layer that is no loss.

    floor: the score to be reached. For each layer in turn bisection finds the smallest share, in steps of `step`,
    with which it and all deeper layers reach the floor. Rests on the paper's assumption: deeper layers need no more
    tokens than those before them; where fewer tokens are never better, too, no schedule with smaller shares passes.
    The paper's abstract names the direction and the assumption; bisection and step are ours.
    """
    whole = score(None)
    if whole < floor:
        raise OptionError(f"the whole model scores {whole:.4g}, below the {floor:.4g} that was asked for.")
    parts = round(1 / step)
    chosen: list[int] = []
    best = Found(None, whole)
    for i in range(len(layers)):
        low, high = 0, chosen[-1] if chosen else parts  # high is known to reach the floor
        while low < high:
            middle = (low + high) // 2
            counts = [*chosen, *[middle] * (len(layers) - i)]
            schedule = of_shares(layers, [n / parts for n in counts])
            reached = score(schedule)
            if reached >= floor:
                high, best = middle, Found(schedule, reached)
            else:
                low = middle + 1
        chosen.append(high)
    return best


def withdrawal(score: Score, layers: Sequence[int], floor: float) -> Found:
    """VTW's search (AAAI 2025, arXiv 2405.05803): the first layer in front of which all visual tokens can go.

    floor: the score that must be reached; the paper's is minus the divergence of the next token, at least -0.003 for
    LLaVA-1.5-7B. Layers are tried from shallow to deep. Nothing is dropped where none of them reaches it.
    """
    for layer in layers:
        schedule = Schedule(((layer, 0.0),))
        reached = score(schedule)
        if reached >= floor:
            return Found(schedule, reached)
    return Found(None, score(None))


Shape = tuple[float, float, float]
"""Steepness, lowest and highest share of a sigmoid; the budget decides the rest."""


@dataclass(frozen=True)
class Sigmoid:
    """P-Sigmoid's family of schedules: shares that fall from `high` to `low` around layer `middle`."""

    steepness: float
    middle: float
    low: float = 0.0
    high: float = 1.0

    def share(self, layer: int) -> float:
        """low + (high - low) / (1 + exp(steepness * (layer - middle))), in thousandths."""
        fall = min(self.steepness * (layer - self.middle), 700.0)  # exp() ends near 709
        return round(self.low + (self.high - self.low) / (1 + math.exp(fall)), 3)

    def schedule(self, layers: Sequence[int]) -> Schedule | None:
        """The shares of these layers as a schedule."""
        return of_shares(layers, [self.share(layer) for layer in layers])

    @staticmethod
    def within(budget: float, cost: Cost, layers: Sequence[int], shape: Shape) -> Sigmoid:
        """The latest fall that costs no more than `budget`, which covers the shape's lowest share everywhere.

        The middle is what the budget decides, by bisection between a fall that is over and one that has not begun.
        """
        steepness, low, high = shape
        first, last = -20 / steepness, max(layers) + 20 / steepness  # exp(-20) is below a thousandth
        late = Sigmoid(steepness, last, low, high)
        if cost(late.schedule(layers)) <= budget:
            return late
        for _ in range(40):
            middle = (first + last) / 2
            affordable = cost(Sigmoid(steepness, middle, low, high).schedule(layers)) <= budget
            first, last = (middle, last) if affordable else (first, middle)
        return Sigmoid(steepness, first, low, high)

    @staticmethod
    def fit(schedule: Schedule, layers: Sequence[int]) -> Sigmoid:
        """The sigmoid nearest to a schedule, in the sum of squares over its layers: where a search may start."""
        wanted = [schedule.share(layer) for layer in layers]
        depth = max(layers) + 1
        tries = [
            Sigmoid(2.0**power / depth, i / 4, wanted[-1], wanted[0]) for power in range(1, 8) for i in range(4 * depth)
        ]
        return min(tries, key=lambda s: sum((s.share(at) - w) ** 2 for at, w in zip(layers, wanted, strict=True)))


@dataclass(frozen=True)
class Trials:
    """How the shapes of `sigmoid` are drawn. sampler: optuna (Bayesian) or random; count: how many are tried."""

    count: int = 40
    sampler: str = "optuna"
    seed: int = 0


def sigmoid(
    score: Score,
    layers: Sequence[int],
    cost: Cost,
    budget: float,
    trials: Trials | None = None,
    start: Schedule | None = None,
) -> Found:
    """P-Sigmoid (CVPR 2025, arXiv 2412.00556): the best of the sigmoid schedules that cost no more than `budget`.

    Bayesian optimisation (optuna's tree-structured Parzen estimator, seeded) over steepness, lowest and highest share;
    the budget decides the middle. start: a schedule of `greedy`, whose fit is the first to be tried, as in the paper.
    Of equal scores the cheapest wins, then the first. The abstract names family, start and optimiser; the
    parametrisation is ours.
    """
    trials = trials or Trials()
    if cost(None) <= budget:
        return Found(None, score(None))
    roof = _largest_everywhere(budget, cost, layers)
    near = None if start is None else Sigmoid.fit(start, layers)
    first = (8 / (max(layers) + 1), 0.0, 1.0) if near is None else (near.steepness, min(near.low, roof), near.high)
    best: tuple[float, float, Schedule | None] = (-math.inf, 0.0, None)  # score, minus cost

    def value(shape: Shape) -> float:
        nonlocal best
        schedule = Sigmoid.within(budget, cost, layers, shape).schedule(layers)
        reached = score(schedule)
        if (reached, -cost(schedule)) > best[:2]:
            best = (reached, -cost(schedule), schedule)
        return reached

    draw = {"optuna": _optuna, "random": _random}.get(trials.sampler)
    if draw is None:
        raise unknown("sampler", trials.sampler, SAMPLERS)
    draw(value, _Ranges((0.5 / len(layers), 16.0), roof), first, trials)
    return Found(best[2], best[0])


def _largest_everywhere(budget: float, cost: Cost, layers: Sequence[int]) -> float:
    """The largest share, in thousandths, that all layers can have; refuses a budget that not even 0 meets."""

    def of(thousandths: int) -> float:
        return cost(of_shares(layers, [thousandths / 1000] * len(layers)))

    if of(0) > budget:
        raise OptionError(
            f"a cost of {budget:g} cannot be met: without any visual token from layer {layers[0]} on it is still "
            f"{of(0):.3g} of the whole. Ask for that or more, or drop in front of an earlier layer."
        )
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) <= budget else (low, middle)
    return low / 1000


@dataclass(frozen=True)
class _Ranges:
    """Where shapes are drawn: steepness, and lowest share up to `roof`."""

    steepness: tuple[float, float]
    roof: float


def _random(value: Callable[[Shape], float], ranges: _Ranges, first: Shape, trials: Trials) -> None:
    """Shapes drawn independently, behind the first."""
    value(first)
    draw = random.Random(trials.seed)
    for _ in range(trials.count - 1):
        low = draw.random() * ranges.roof
        value((math.exp(draw.uniform(*map(math.log, ranges.steepness))), low, low + draw.random() * (1 - low)))


def _optuna(value: Callable[[Shape], float], ranges: _Ranges, first: Shape, trials: Trials) -> None:
    """Shapes that optuna's sampler proposes from those before."""
    try:
        import optuna
    except ImportError as error:
        raise missing_extra("optuna", "search", "a Bayesian search (sampler='random' does without)") from error
    sampler = optuna.samplers.TPESampler(seed=trials.seed, n_startup_trials=max(5, trials.count // 4))
    shown = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would print a line per trial into the progress bar
    try:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        steep, low, high = first
        steep = min(max(steep, ranges.steepness[0]), ranges.steepness[1])
        study.enqueue_trial({"steepness": steep, "low": low, "span": (high - low) / (1 - low) if low < 1 else 1.0})
        for _ in range(trials.count):
            trial = study.ask()
            steep = trial.suggest_float("steepness", *ranges.steepness, log=True)
            low = trial.suggest_float("low", 0.0, ranges.roof)
            study.tell(trial, value((steep, low, low + trial.suggest_float("span", 0.0, 1.0) * (1 - low))))
    finally:
        optuna.logging.set_verbosity(shown)
