"""Randomised principal components against the exact decomposition."""

from __future__ import annotations

import pytest
import torch

from tokprune.methods.connector.prunesid import randomised_pca


def test_finds_the_leading_components() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 8, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(40, 8, generator=generator)).Q
    x = (left * 4.0 ** -torch.arange(8.0)) @ right.T
    exact = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4]
    found = randomised_pca(x + 3.0, 4, seed=1)  # a constant is no component
    torch.testing.assert_close((exact @ found).abs(), torch.eye(4), atol=1e-3, rtol=0)


def test_orthonormal_also_without_variance() -> None:
    for x in (torch.ones(10, 6), torch.randn(10, 6, generator=torch.Generator().manual_seed(1))):
        found = randomised_pca(x, 6)
        torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_draws_as_torch_does_behind_a_seed(dtype: torch.dtype, atol: float) -> None:
    """The same draw and the same steps, so the same but for rounding, which sums in another order here."""
    for shape in ((50, 20), (20, 50)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            expected = torch.pca_lowrank(x, q=6)[2]
        torch.testing.assert_close(randomised_pca(x, 6, seed=7), expected, atol=atol, rtol=0)
        torch.testing.assert_close(randomised_pca(x.expand(3, *shape), 6, seed=7)[2], expected, atol=atol, rtol=0)
