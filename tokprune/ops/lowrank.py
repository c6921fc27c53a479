"""Principal directions by random projection, with a random source of its own."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def randomised_pca(samples: Tensor, rank: int, seed: int = 0, rounds: int = 2) -> Tensor:
    """Loadings of the variables on the first `rank` principal directions (Halko et al., SIAM Review 2011, algorithm 4.4).

    samples: (S, V), S observations of V variables, centred here. rank: at most min(S, V). Returns (V, rank), orthonormal columns,
    in float32 (float64 stays); the sign of a column is arbitrary. The random draw depends on `seed` alone, on any device, and
    leaves torch's global generator as it was.
    """
    wide = samples if samples.dtype == torch.float64 else samples.float()
    centred = wide - wide.mean(0, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(centred.shape[1], rank, generator=generator, dtype=torch.float64).to(centred)
    basis = torch.linalg.qr(centred @ draw).Q  # (S, rank)
    for _ in range(rounds):  # power iterations sharpen a slowly falling spectrum
        basis = torch.linalg.qr(centred.T @ basis).Q
        basis = torch.linalg.qr(centred @ basis).Q
    return torch.linalg.svd(basis.T @ centred, full_matrices=False).Vh.T  # (V, rank)
