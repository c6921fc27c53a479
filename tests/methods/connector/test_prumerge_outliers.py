"""The outlier rule of the box plot, against NumPy."""

from __future__ import annotations

import numpy as np
import torch

from tokprune.methods.connector.prumerge import upper_outliers


def test_equals_numpy() -> None:
    for n in (1, 2, 5, 100, 577):
        values = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).exp()
        low, high = np.percentile(values.numpy(), [25, 75], axis=1)
        expected = values.numpy() > (high + 1.5 * (high - low))[:, None]
        assert np.array_equal(upper_outliers(values).numpy(), expected)


def test_equal_values_have_no_outlier() -> None:
    assert not upper_outliers(torch.ones(2, 9)).any()
