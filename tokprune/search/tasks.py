"""Scores of a schedule on benchmarks: tasks of lmms-eval, by their own metrics or against the whole model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokprune.errors import OptionError, unknown
from tokprune.evaluation.cells import BASELINE, Cell, CellResult
from tokprune.evaluation.table import TOTAL
from tokprune.schedule import Schedule
from tokprune.search.scores import check_decoder, scheduled

if TYPE_CHECKING:
    from tokprune.evaluation.harness import Harness

KINDS = ("accuracy", "agreement")


@dataclass
class TaskScore:
    """The score of a schedule by tasks of lmms-eval; call it with a schedule, or None for the whole model.

    kind: "accuracy", the tasks' main metrics over those of the whole model (the other way round where lower is better),
    mean over tasks; "agreement", the share of answers that are those of the whole model.
    """

    harness: Harness
    method: str
    tasks: Sequence[str]
    kind: str = "accuracy"
    options: dict[str, object] = field(default_factory=dict)
    """Of the decoder method."""
    _whole: list[CellResult] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("score of lmms-eval tasks", self.kind, KINDS)
        check_decoder(self.method)

    @property
    def whole(self) -> list[CellResult]:
        """What the whole model does, task by task."""
        if not self._whole:
            self._whole = self._run(None)
        return self._whole

    @property
    def tokens(self) -> tuple[int, int]:
        """Mean visual tokens and mean other tokens of a prompt, rounded."""
        costs = [result.costs for result in self.whole]
        visual = sum(c[TOTAL] for c in costs) / len(costs)
        return round(visual), round(sum(c["prompt_tokens"] for c in costs) / len(costs) - visual)

    def __call__(self, schedule: Schedule | None) -> float:
        """The score, higher is better; the whole model's is 1."""
        if schedule is None:
            return float(bool(self.whole))
        pairs = list(zip(self._run(schedule), self.whole, strict=True))
        if self.kind == "agreement":
            same = [
                a.answer == b.answer for ours, whole in pairs for a, b in zip(ours.samples, whole.samples, strict=True)
            ]
            return sum(same) / len(same)
        return sum(_share(ours, whole) for ours, whole in pairs) / len(pairs)

    def _run(self, schedule: Schedule | None) -> list[CellResult]:
        config = scheduled(self.method, schedule, **self.options)
        results = [self.harness(Cell(task, BASELINE, 1.0), config) for task in self.tasks]
        return [result for result in results if result is not None]


def _share(ours: CellResult, whole: CellResult) -> float:
    """What is left of a task's main metric."""
    ours_value, whole_value = ours.metrics[ours.main], whole.metrics[whole.main]
    above, below = (ours_value, whole_value) if whole.higher_is_better else (whole_value, ours_value)
    if not below:
        raise OptionError(
            f"{whole.cell.task}: {whole.main} is 0, so that nothing can be compared with it; ask more questions, or "
            "search by --score agreement."
        )
    return above / below
