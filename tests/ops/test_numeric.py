"""The number format of choices: width, scores that are no numbers, stretching."""

from __future__ import annotations

import math

import torch

from tokprune.ops.numeric import finite, stretched, wide


def test_choices_are_made_in_float32_or_wider_and_without_a_graph() -> None:
    assert wide(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert not wide(torch.ones(2, requires_grad=True)).requires_grad


def test_scores_that_are_no_numbers_are_the_worst_and_at_most_zero() -> None:
    assert finite(torch.tensor([math.nan, 2.0, 3.0, math.inf])).tolist() == [0.0, 2.0, 3.0, 0.0]
    assert finite(torch.tensor([-3.0, math.nan, 1.0, -math.inf])).tolist() == [-3.0, -3.0, 1.0, -3.0]
    assert finite(torch.tensor([math.nan, math.inf])).tolist() == [0.0, 0.0]


def test_scores_are_stretched_to_0_and_1() -> None:
    assert stretched(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert stretched(torch.tensor([-4.0, -2.0])).tolist() == [0.0, 1.0]
    assert stretched(torch.tensor([1.0, 1.0 + 1.2e-6])).tolist() == [0.0, 1.0]
    assert stretched(torch.tensor([0.0, 1e-3])).tolist() == [0.0, 1.0]


def test_scores_that_differ_by_rounding_alone_are_all_1() -> None:
    assert stretched(torch.tensor([5.0, 5.0, 5.0])).tolist() == [1.0] * 3
    assert stretched(torch.tensor([1.0, 1.0 + 6e-7])).tolist() == [1.0] * 2  # five units in the last place
    assert stretched(torch.tensor([-1.0 - 6e-7, -1.0])).tolist() == [1.0] * 2
    assert stretched(torch.zeros(3)).tolist() == [1.0] * 3
