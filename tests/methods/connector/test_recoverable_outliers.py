"""The local outlier factor against its definition, token by token."""

from __future__ import annotations

import pytest
import torch

from tokprune.methods.connector.recoverable import local_outlier_factor, outliers


def by_definition(values: list[float], k: int) -> list[float]:
    n = len(values)
    k = min(k, n - 1)
    near = [
        sorted((j for j in range(n) if j != i), key=lambda j: (abs(values[i] - values[j]), values[j]))[:k]
        for i in range(n)
    ]
    far = [abs(values[i] - values[near[i][-1]]) for i in range(n)]
    density = [1 / (sum(max(abs(values[i] - values[j]), far[j]) for j in near[i]) / k + 1e-10) for i in range(n)]
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(n)]


@pytest.mark.parametrize(("n", "k"), [(2, 20), (5, 2), (30, 20), (60, 5), (60, 20)])
def test_definition(n: int, k: int) -> None:
    values = torch.rand(2, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) ** 3
    found = local_outlier_factor(values, k)
    for row, factors in zip(values.tolist(), found.tolist(), strict=True):
        assert factors == pytest.approx(by_definition(row, k), rel=1e-9)


def test_what_stands_apart() -> None:
    values = torch.linspace(0, 1, 50)
    values[20] = 9
    assert outliers(values).nonzero()[:, 0].tolist() == [20]


def test_scale_and_order_do_not_matter() -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    factors = local_outlier_factor(values, 5)
    torch.testing.assert_close(local_outlier_factor(values[shuffle] * 64, 5), factors[shuffle], rtol=1e-6, atol=0)


def test_degenerate_inputs() -> None:
    assert local_outlier_factor(torch.tensor([3.0])).tolist() == [1.0]
    assert not outliers(torch.full((30,), 0.2)).any()
    assert torch.isfinite(local_outlier_factor(torch.tensor([0.0] * 25 + [1.0]))).all()
