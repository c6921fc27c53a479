"""The processes of one evaluation: alone, or the ranks of a torchrun; rank 0 decides and writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Which process this is. With size 1 nothing of torch.distributed is touched."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value if self.leads else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    @staticmethod
    def launched() -> Team:
        """The team that torchrun started, known before torch.distributed is set up; it cannot agree on anything yet."""
        return Team(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @staticmethod
    def running() -> Team:
        """The team of this process, if torch.distributed was set up; else this process alone."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return Team(dist.get_rank(), dist.get_world_size())
        return Team()
