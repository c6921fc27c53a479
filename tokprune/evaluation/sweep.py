"""Runs the cells of a sweep one after another: resumes, goes on when one fails, and writes what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tokprune.evaluation.cells import Cell, CellResult, SweepSettings
from tokprune.evaluation.errors import EvaluationError, Failure, failure
from tokprune.evaluation.store import Store, StoreError
from tokprune.evaluation.team import Team
from tokprune.types import JsonObject

#: Runs one cell. Under torchrun every rank calls it, and ranks other than 0 may return None.
RunCell = Callable[[Cell], "CellResult | None"]


class Watcher:
    """What a sweep tells while it runs; a progress bar overrides what it shows."""

    def start(self, cells: Sequence[Cell], finished: int) -> None:
        """All cells, and how many of them are already there."""

    def begin(self, cell: Cell) -> None:
        """A cell starts."""

    def finish(self, cell: Cell, result: CellResult | None) -> None:
        """A cell ended well."""

    def fail(self, failed: Failure) -> None:
        """A cell failed."""


@dataclass
class Sweep:
    """What a sweep found: results and failures, in the order of the plan."""

    settings: SweepSettings
    environment: JsonObject
    results: list[CellResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def baseline(self, task: str) -> CellResult | None:
        """The unpruned run of a task."""
        return next((r for r in self.results if r.cell.task == task and r.cell.baseline), None)

    @property
    def tasks(self) -> list[str]:
        """The tasks with results, in order."""
        return list(dict.fromkeys(r.cell.task for r in self.results))


@dataclass
class Survey:
    """Which cells are finished, which failed before and stay so, and which are to run."""

    results: dict[Cell, CellResult] = field(default_factory=dict)
    failures: dict[Cell, Failure] = field(default_factory=dict)
    todo: list[Cell] = field(default_factory=list)


def survey(cells: Sequence[Cell], store: Store, retry_failed: bool = False) -> Survey:
    """What the results folder already holds of these cells."""
    state = Survey()
    for cell in cells:
        result, known = store.load(cell), store.failure(cell)
        if result is not None:
            state.results[cell] = result
        elif known is not None and not retry_failed:
            state.failures[cell] = Failure(cell, **known)
        else:
            state.todo.append(cell)
    return state


def run_sweep(
    cells: Sequence[Cell],
    store: Store,
    run_cell: RunCell,
    *,
    watcher: Watcher | None = None,
    retry_failed: bool = False,
    team: Team | None = None,
) -> Sweep:
    """Run what is not finished yet and return everything, on rank 0; other ranks get an empty sweep.

    A cell that failed before is not run again unless retry_failed. An error in one cell is noted and the next one
    starts; a folder that cannot be written ends the sweep (StoreError). Under torchrun a row that fails
    (EvaluationError) fails on all ranks, and the sweep goes on; any other error ends the whole run, since the other
    ranks might wait for ever for the one that failed. The same command then goes on behind the failed cell.
    """
    watcher, team = watcher or Watcher(), team or Team()
    sweep = Sweep(store.settings, store.environment)
    state = survey(cells, store, retry_failed) if team.leads else Survey()
    results, failures, todo = state.results, state.failures, team.agree(state.todo)
    watcher.start(cells, len(cells) - len(todo))
    for cell in todo:
        watcher.begin(cell)
        started = time.perf_counter()
        try:
            result = run_cell(cell)
            if team.leads:
                if result is None:
                    raise RuntimeError("the harness returned no result to rank 0")
                result = replace(result, timing={**result.timing, "seconds": time.perf_counter() - started})
                store.save(result)
                results[cell] = result
        except (StoreError, KeyboardInterrupt):
            raise
        except (Exception, SystemExit) as error:  # a task may call sys.exit on a missing file
            failures[cell] = failure(cell, error)
            if team.leads or not isinstance(error, EvaluationError):
                store.save_failure(cell, failures[cell].to_dict())
            watcher.fail(failures[cell])
            if team.size > 1 and not isinstance(error, EvaluationError):
                raise
        else:
            watcher.finish(cell, result)
    if team.leads:
        sweep.results = [results[c] for c in cells if c in results]
        sweep.failures = [failures[c] for c in cells if c in failures]
    return sweep
