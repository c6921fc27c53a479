"""Gradient checkpointing: which run of a tower a backward pass computes again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic

import torch
from torch import Tensor

from tokprune.adapters.hooks import Lock
from tokprune.runtime.encoder.run import R


def recomputing() -> bool:
    """Whether this forward is a recomputation inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class PastRuns(Generic[R]):
    """Runs of a tower whose backward may still compute blocks again; a copy of the model has none."""

    def __init__(self) -> None:
        self._runs: list[R] = []
        self._lock = Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return PastRuns, ()

    def __iter__(self) -> Iterator[R]:
        return iter(self._runs)

    def add(self, run: R, index: int, x: Tensor) -> None:
        """Block `index` of `run` was entered by `x`, which a checkpoint may keep."""
        run.entries[index] = weakref.ref(x)
        with self._lock:
            self._runs = [*(r for r in self._runs if r is not run and r.held()), run]

    def entered_by(self, index: int, x: Tensor) -> R | None:
        """The last run whose input to block `index` is still alive and lies where `x` lies."""
        place = x.data_ptr()
        return next((run for run in reversed(self._runs) if run.entered(index) == place), None)
