"""Why a cell failed, in one sentence: the cause behind the wrappers that libraries put around it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from tokprune.evaluation.cells import Cell


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
        if below is None and not _explains_itself(error):
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


def _explains_itself(error: BaseException) -> bool:
    """Whether an error was written for users; its cause would say less."""
    from tokprune.errors import TokpruneError

    return isinstance(error, TokpruneError)
