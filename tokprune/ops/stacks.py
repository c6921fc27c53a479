"""Tiles or frames of equal size and budget as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Stack(NamedTuple):
    """Groups that one call can treat. where: (G, n) positions in the stream. keep: budget of each. label: what they share."""

    where: Tensor
    keep: int
    label: Any


def stacks(
    sizes: Sequence[int],
    budgets: Sequence[int],
    device: torch.device | str,
    labels: Sequence[Hashable] | None = None,
) -> list[Stack]:
    """Put groups of equal size, budget and label together; those without a budget are left out.

    sizes, budgets, labels: one entry per group; groups lie one after the other in the stream, as Layout demands.
    """
    same: dict[tuple[int, int, Hashable], list[int]] = {}
    start = 0
    for i, (size, keep) in enumerate(zip(sizes, budgets, strict=True)):
        if keep > 0:
            same.setdefault((size, keep, None if labels is None else labels[i]), []).append(start)
        start += size
    return [
        Stack(torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device), keep, label)
        for (size, keep, label), starts in same.items()
    ]
