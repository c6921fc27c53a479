"""Greedy farthest-point choice with a running minimum: O(K N) after the distances are known."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_max_min(distance: Tensor, first: Tensor, keep: int) -> Tensor:
    """Pick `keep` points, each as far as possible from those already picked.

    distance: (B, N, N). first: (B,) index of the first pick. Returns (B, keep) in the order of choice. Ties go to the lower
    index; a picked point is never picked again. No host synchronisation.
    """
    batch, n, _ = distance.shape
    rows = torch.arange(batch, device=distance.device)
    order = torch.empty(batch, keep, dtype=torch.long, device=distance.device)
    nearest = torch.full((batch, n), torch.inf, dtype=distance.dtype, device=distance.device)
    pick = first
    for step in range(keep):
        order[:, step] = pick
        nearest = torch.minimum(nearest, distance[rows, pick])
        nearest[rows, pick] = -torch.inf  # stays -inf: every later minimum keeps it
        pick = nearest.argmax(-1)
    return order
