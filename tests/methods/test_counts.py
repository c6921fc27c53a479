"""Counts that methods compute from an option are those of the decimal number that was typed."""

from __future__ import annotations

import pytest
import torch

from tokprune.methods.connector.hired import hired_budgets
from tokprune.methods.connector.recoverable import recoverable
from tokprune.tokens import Layout

SHARES = [29, 55, 57, 58]  # hundredths whose float64 product with 100 is not whole


@pytest.mark.parametrize("hundredths", SHARES)
def test_the_thumbnail_of_hired(hundredths: int) -> None:
    layout = Layout.grid(10, 10, 3, "tiles", thumbnail=True, canvas=(1, 2))
    assert hired_budgets(torch.rand(300), layout, 100, hundredths / 100)[0] == hundredths


def test_one_outlier_of_49_is_one_token() -> None:
    """1 / 49 * 49 is less than 1 in float64, and the published code keeps none."""
    attention, flat = torch.linspace(1, 2, 49), torch.linspace(1, 2, 49)
    attention[7] = 9.0
    visual, _ = recoverable(attention, flat, high_only=True)
    assert visual.nonzero().flatten().tolist() == [7]
    assert not recoverable(attention, flat)[0].any()
