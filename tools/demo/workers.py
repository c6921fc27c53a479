"""Data-parallel workers: one process on an accelerator, a few single-thread processes on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Worker:
    """This process's place among its equals, and the device that it computes on."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this worker writes logs and checkpoints."""
        return self.rank == 0

    def average(self, flat: torch.Tensor) -> torch.Tensor:
        """Mean over the workers, in place."""
        if self.count > 1:
            dist.all_reduce(flat)
            flat /= self.count
        return flat

    def barrier(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            dist.barrier()


def launch(function: Callable[..., None], workers: int, *arguments: Any) -> None:
    """Call `function(worker, *arguments)` in `workers` processes; in this one when one suffices.

    With a CUDA device there is always one worker. On a CPU each worker keeps to one thread: on shared cores two
    single-thread processes waste less time at barriers than one process with two threads.
    """
    if torch.cuda.is_available():
        function(Worker(0, 1, torch.device("cuda")), *arguments)
    elif workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            function(Worker(), *arguments)
        finally:
            torch.set_num_threads(threads)
    else:
        with tempfile.TemporaryDirectory() as folder:
            meeting_point = (Path(folder) / "store").as_uri()
            mp.spawn(_enter, args=(workers, meeting_point, function, arguments), nprocs=workers)


def _enter(
    rank: int, count: int, meeting_point: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=count)
    try:
        function(Worker(rank, count), *arguments)
    finally:
        dist.destroy_process_group()
