"""The choice of PruMerge+ as its authors run it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.connector.prumerge import best


def spatial_step(n: int, count: int) -> int:
    """Distance of the spatial samples: about three of them for each of the `count` outstanding tokens."""
    return int(int(1 / (count / n)) / 3)


def prumerge_plus_order(attention: Tensor, count: int, step: int) -> Tensor:
    """What the published code keeps of one image, at the count that the image chose.

    attention: (N,). The `count` best, best first, then every step-th token up to but without the last one, ascending,
    as far as not among the best. Returns (K,); the host waits for K.
    """
    n = attention.shape[0]
    top = best(attention[None], count)[0]
    samples = torch.zeros(n, dtype=torch.bool, device=attention.device)
    samples[0 : n - 1 : step] = True
    return torch.cat([top, samples.scatter(0, top, False).nonzero()[:, 0]])
