"""All pairs of many tokens without their whole matrix: block by block, or the rows that a loop asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

WHOLE = 8192
"""Tokens up to which a matrix of all pairs is held at once: 256 MiB in float32. With more, blocks of it are made, and
made again where they are needed twice: the same numbers but for rounding, in more time."""
ROWS = 512
"""Rows of a block where the matrix is not held."""


def whole(*sizes: int) -> bool:
    """Whether a matrix of these sides is held at once."""
    pairs = 1
    for n in sizes:
        pairs *= n
    return pairs <= WHOLE**2


def together(pictures: Sequence[T], n: int) -> list[Sequence[T]]:
    """Pictures of n tokens each, cut into as many as one call may hold all pairs of, at least one."""
    count = max(1, WHOLE**2 // max(n, 1) ** 2)
    return [pictures[i : i + count] for i in range(0, len(pictures), count)]


def row_blocks(n: int, columns: int | None = None) -> Iterator[slice]:
    """Rows of an (n, columns) matrix that are in memory together, (n, n) without `columns`: all of them while they are
    few.
    """
    step = n if whole(n, n if columns is None else columns) else ROWS
    for start in range(0, n, max(step, 1)):
        yield slice(start, min(start + step, n))


class Rows:
    """Rows of a matrix as a greedy loop picks them, made when they are asked for.

    make: (m,) numbers of rows -> (m, N). On a CPU, where products of matrices are fast and of vectors slow, the rows
    of what may be picked next are made together.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make, self._ahead = make, ROWS // 8
        self._held: dict[int, Tensor] = {}

    def row(self, pick: Tensor, worth: Tensor) -> Tensor:
        """Row `pick` (1,). worth: (N,), the highest are likely to be picked next. -> (N,)."""
        if pick.device.type != "cpu":
            return self._make(pick)[0]
        if int(pick) not in self._held:
            which = torch.cat([pick, worth.topk(min(self._ahead, len(worth))).indices])
            self._held = dict(zip(which.tolist(), self._make(which), strict=True))
        return self._held[int(pick)]
