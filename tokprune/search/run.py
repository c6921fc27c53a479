"""One search from what was asked to what was found, as data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokprune.errors import OptionError, unknown
from tokprune.profiling import formulas
from tokprune.profiling.formulas import DecoderShape, layer_tokens, prefill_share
from tokprune.schedule import Schedule
from tokprune.search.strategies import STEP, Found, Score, Trials, greedy, sigmoid, withdrawal
from tokprune.types import JsonObject

TYPE, VERSION = "tokprune.Search", 1
STRATEGIES = ("greedy", "sigmoid", "withdraw")


@dataclass(frozen=True)
class SearchGoal:
    """What a schedule should keep or save.

    Raises OptionError where nothing is asked for, or the strategy cannot give it.
    """

    floor: float | None = None
    """The least score, as a share of the whole model's; for "kl", minus the largest divergence."""
    max_flops: float | None = None
    """The largest share of the prefill's FLOPs in the LLM."""
    strategy: str | None = None
    """greedy (G-Search), sigmoid (P-Sigmoid) or withdraw (VTW); by default sigmoid under max_flops, else greedy."""
    step: float = STEP
    """Of the shares of greedy."""
    trials: Trials = field(default_factory=Trials)
    """Of sigmoid."""

    def __post_init__(self) -> None:
        if self.floor is None and self.max_flops is None:
            raise OptionError("say what the schedule should keep (--min-accuracy 0.98) or save (--max-flops 0.5).")
        if self.max_flops is not None and not 0 < self.max_flops <= 1:
            raise OptionError(f"max_flops={self.max_flops!r} is a share of the whole model's, in (0, 1].")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise unknown("strategy", self.strategy, STRATEGIES)
        if self.way == "sigmoid" and self.max_flops is None:
            raise OptionError("the strategy sigmoid spends a budget; give it: --max-flops 0.5.")
        if self.way != "sigmoid" and (self.floor is None or self.max_flops is not None):
            raise OptionError(f"the strategy {self.way} saves what it can above a score; give --min-accuracy alone.")

    @property
    def way(self) -> str:
        """The strategy that is taken."""
        return self.strategy or ("greedy" if self.max_flops is None else "sigmoid")

    def evaluations(self, layers: int) -> int:
        """Scores that a search takes at most."""
        each = (round(1 / self.step)).bit_length()
        counts = {"greedy": 1 + layers * each, "withdraw": layers + 1, "sigmoid": self.trials.count + 1}
        curve = counts["greedy"] if self.way == "sigmoid" and self.floor is not None else 0
        return counts[self.way] + curve


@dataclass(frozen=True)
class Searched:
    """What a search found, and what that costs. tokens: visual and other ones of a mean prompt."""

    found: Found
    whole: float
    """Score of the whole model."""
    wanted: SearchGoal
    shape: DecoderShape
    tokens: tuple[int, int]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the score reaches the floor that was asked for."""
        return self.wanted.floor is None or self.found.score >= floor_of(self.wanted.floor, self.whole)

    @property
    def flops(self) -> float:
        """Share of the exact FLOPs of the LLM's layers in a prefill."""
        return share_of(self.found.schedule, self.shape, self.tokens)

    def to_dict(self) -> JsonObject:
        """Plain data: the schedule, its score, its cost exactly and by the papers' formulas."""
        schedule, (visual, text) = self.found.schedule, self.tokens
        per_layer, full = (layer_tokens(s, visual, self.shape.layers) for s in (schedule, None))
        by_formula = {
            name: formulas.formula_total(f, per_layer, self.shape) / formulas.formula_total(f, full, self.shape)
            for name, f in formulas.FORMULAS.items()
        }
        return {
            "type": TYPE,
            "version": VERSION,
            "strategy": self.wanted.way,
            "schedule": None if schedule is None else [list(step) for step in schedule.steps],
            "score": self.found.score,
            "score_of_the_whole_model": self.whole,
            "visual_tokens": visual,
            "other_tokens": text,
            "visual_tokens_per_layer": per_layer,
            "visual_tokens_on_average": sum(per_layer) / len(per_layer),
            "flops_share": self.flops,
            "flops_share_by_formula": by_formula,
            "seconds": self.seconds,
        }


def floor_of(floor: float, whole: float) -> float:
    """The score that must be reached. floor: a share of the whole model's, or minus a divergence."""
    return floor * whole if floor > 0 else floor


def share_of(schedule: Schedule | None, shape: DecoderShape, tokens: tuple[int, int]) -> float:
    """Exact share of the layers' prefill FLOPs. tokens: visual and other ones."""
    return 1.0 if schedule is None else prefill_share(schedule, shape, *tokens)


def search(
    score: Score, layers: Sequence[int], wanted: SearchGoal, shape: DecoderShape, tokens: tuple[int, int]
) -> Searched:
    """Find a schedule. layers: those in front of which may be dropped. tokens: visual and other ones of a mean prompt.

    With a score and a budget, the greedy curve above the score is found first, and the sigmoids start at its fit.
    """
    started = time.perf_counter()
    whole = score(None)
    floor = None if wanted.floor is None else floor_of(wanted.floor, whole)
    if wanted.max_flops is not None:
        start = None if floor is None else greedy(score, layers, floor, wanted.step).schedule
        found = sigmoid(score, layers, lambda s: share_of(s, shape, tokens), wanted.max_flops, wanted.trials, start)
    else:
        assert floor is not None  # Wanted refuses to have neither
        found = (
            withdrawal(score, layers, floor) if wanted.way == "withdraw" else greedy(score, layers, floor, wanted.step)
        )
    return Searched(found, whole, wanted, shape, tokens, time.perf_counter() - started)
