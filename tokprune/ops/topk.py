"""The best of each group when the budgets are known on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokprune.ops.ranking import top_in_groups


def grouped_top(scores: Tensor, group: Tensor, budgets: Sequence[int]) -> Tensor:
    """The `budgets[g]` best tokens of every group g, as ascending indices; equal scores: lower index first.

    scores: (N,). group: (N,) group number of each token. budgets: one per group, at most the group's size. Returns
    (sum of budgets,).
    """
    quota = torch.tensor(list(budgets), dtype=torch.long, device=scores.device)
    return top_in_groups(scores, group.to(scores.device), quota, sum(budgets))
