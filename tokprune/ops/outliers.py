"""Local outlier factor of plain numbers: which scores stand apart from their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def local_outlier_factor(values: Tensor, neighbours: int = 20) -> Tensor:
    """How much sparser each value lies than its nearest values do; about 1 inside a crowd, larger outside.

    values: (..., N) -> (..., N) in float64 (differences between attention shares are tiny). With k = min(neighbours, N - 1),
    N_k(i) the k values nearest to i, and kd(j) the distance of j to its k-th nearest (Breunig et al., SIGMOD 2000,
    definitions 3 to 7): reach(i, j) = max(|i - j|, kd(j)); density(i) = 1 / (mean over j in N_k(i) of reach(i, j) + 1e-10);
    factor(i) = mean over j in N_k(i) of density(j) / density(i). On a line the k nearest lie within k places of the sorted
    order, so this takes O(N k) time and memory. Of equally distant neighbours the smaller value is taken.
    """
    n = values.shape[-1]
    k = min(neighbours, n - 1)
    if k < 1:
        return torch.ones_like(values, dtype=torch.float64)
    line, order = torch.sort(values.double(), dim=-1, stable=True)
    steps = torch.cat([torch.arange(-k, 0, device=values.device), torch.arange(1, k + 1, device=values.device)])
    near = torch.arange(n, device=values.device)[:, None] + steps  # (N, 2k) places in the sorted order
    outside = (near < 0) | (near >= n)
    near = near.clamp(0, n - 1)
    gap = (line[..., near] - line[..., None]).abs().masked_fill(outside, torch.inf)
    gap, pick = (x[..., :k] for x in torch.sort(gap, dim=-1, stable=True))  # (..., N, k)
    near = near.expand((*gap.shape[:-1], 2 * k)).gather(-1, pick)
    far = gap[..., -1]  # (..., N) distance to the k-th nearest

    def of_neighbours(x: Tensor) -> Tensor:
        return x.gather(-1, near.flatten(-2)).unflatten(-1, (n, k))

    density = 1 / (torch.maximum(gap, of_neighbours(far)).mean(-1) + 1e-10)
    factor = of_neighbours(density).mean(-1) / density
    return torch.empty_like(factor).scatter(-1, order, factor)


def outliers(values: Tensor, neighbours: int = 20, threshold: float = 1.5) -> Tensor:
    """Which values are outliers: a local outlier factor above `threshold`. (..., N) -> (..., N) bool.

    1.5 is the customary threshold, and what the published methods here rely on.
    """
    return local_outlier_factor(values, neighbours) > threshold
