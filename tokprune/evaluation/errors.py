"""What goes wrong while a benchmark runs: always with the row that it happened at."""

from __future__ import annotations

from tokprune.errors import TokpruneError


class EvaluationError(TokpruneError, RuntimeError):
    """A benchmark row that could not be asked or answered. task and doc_id name the row; doc_id is None for a whole
    task."""

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
