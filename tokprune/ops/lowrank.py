"""Principal directions by random projection, with a random source of its own."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def randomised_pca(samples: Tensor, rank: int, seed: int = 0, rounds: int = 2) -> Tensor:
    """Loadings of the variables on the first `rank` principal directions (Halko et al., SIAM Review 2011, algorithms 4.4, 5.1).

    samples: (..., S, V), S observations of V variables, centred here. rank: at most min(S, V). Returns (..., V, rank),
    orthonormal columns, in float32 (float64 stays); the sign of a column is arbitrary. The random draw depends on `seed` alone,
    on any device, is the same for every item of a batch, and leaves torch's global generator as it was. It is the draw of
    torch.pca_lowrank on a CPU behind torch.manual_seed(seed), so both give the same directions.
    """
    wide = samples if samples.dtype == torch.float64 else samples.float()
    centred = wide - wide.mean(-2, keepdim=True)
    tall = centred.shape[-2] >= centred.shape[-1]
    matrix = centred if tall else centred.mT
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(matrix.shape[-1], rank, generator=generator, dtype=wide.dtype).to(wide.device)
    basis = torch.linalg.qr(matrix @ draw).Q
    for _ in range(rounds):  # power iterations sharpen a slowly falling spectrum
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, _, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return right.mT if tall else basis @ left
