"""Several processes: what each one answered, brought together, so that all of them know all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokprune.evaluation.errors import EvaluationError
from tokprune.evaluation.lmms_meter import SampleRecord


@dataclass
class WorkerOutcome:
    """What a process did in one call. fatal: what ended it. seconds: spent in the model. counted: answers per task
    whose FLOPs were counted."""

    records: list[SampleRecord] = field(default_factory=list)
    failures: list[EvaluationError] = field(default_factory=list)
    fatal: EvaluationError | None = None
    seconds: float = 0.0
    counted: Counter[str] = field(default_factory=Counter)


def gather(outcome: WorkerOutcome, processes: int) -> WorkerOutcome:
    """The outcomes of all processes as one, in the order of tasks and rows; every process gets it.

    An error in one process is an error in all: else the others would wait for it for ever.
    """
    import torch.distributed as dist

    if processes < 2 or not dist.is_available() or not dist.is_initialized():
        return outcome
    parts: list[WorkerOutcome | None] = [None] * processes
    dist.all_gather_object(parts, outcome)
    return merge([p for p in parts if p is not None])


def merge(parts: Sequence[WorkerOutcome]) -> WorkerOutcome:
    """Outcomes of several processes as one. Processes run at the same time, so the longest time counts."""
    records = sorted((r for p in parts for r in p.records), key=lambda r: (r.task, r.doc_id))
    failures = sorted((f for p in parts for f in p.failures), key=lambda f: (f.task, f.doc_id or 0))
    fatal = next((p.fatal for p in parts if p.fatal is not None), None)
    return WorkerOutcome(records, failures, fatal, max(p.seconds for p in parts))
