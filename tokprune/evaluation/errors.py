"""What goes wrong while a benchmark runs: a row's error names the row, a cell's failure the cause in one sentence."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokprune.errors import TokpruneError

if TYPE_CHECKING:
    from tokprune.evaluation.cells import Cell


class EvaluationError(TokpruneError, RuntimeError):
    """A benchmark row that could not be asked or answered: task and doc_id, which is None for a whole task."""

    def __init__(self, message: str, task: str = "", doc_id: int | None = None) -> None:
        super().__init__(message)
        self.task, self.doc_id = task, doc_id

    def __reduce__(self) -> tuple[type[EvaluationError], tuple[str, str, int | None]]:
        return type(self), (str(self), self.task, self.doc_id)  # it travels between processes


def at_row(task: str, doc_id: int, what: str, error: BaseException) -> EvaluationError:
    """The error of one row: what was being done, what happened."""
    reason = str(error).strip() or type(error).__name__
    kind = "" if isinstance(error, TokpruneError) else f"{type(error).__name__}: "
    return EvaluationError(f"task {task!r}, doc_id {doc_id}: {what}: {kind}{reason}", task, doc_id)


@dataclass(frozen=True)
class Failure:
    """A cell that gave no result. error: the class; reason: a sentence; trace: the last lines of the traceback."""

    cell: Cell
    error: str
    reason: str
    trace: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain data without the cell."""
        return {"error": self.error, "reason": self.reason, "trace": self.trace}


def failure(cell: Cell, error: BaseException) -> Failure:
    """The record of an error that ended a cell."""
    cause = root_cause(error)
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return Failure(cell, type(cause).__name__, describe(cause), "".join(lines)[-4000:])


def root_cause(error: BaseException) -> BaseException:
    """The error at the bottom: what a retry loop gave up on, or what another error was explicitly raised from."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        attempt = getattr(error, "last_attempt", None)  # tenacity's RetryError
        below = attempt.exception() if attempt is not None and hasattr(attempt, "exception") else None
        if below is None and not isinstance(error, TokpruneError):  # ours are written for users; a cause would say less
            below = error.__cause__
        if below is None:
            return error
        error = below
    return error


def describe(error: BaseException) -> str:
    """An error as one line; libraries that raise empty errors or call sys.exit get a sentence, too."""
    if isinstance(error, SystemExit):
        return f"the task ended the program: {error.code}" if error.code else "the task ended the program"
    text = " ".join(str(error).split())
    return text[:600] or f"{type(error).__name__} without a message"
