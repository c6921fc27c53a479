"""The counting rule and the sharing of budgets."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokprune.budget import (
    ceil_of,
    check_budget,
    check_ratio,
    counts,
    equal,
    even_steps,
    floor_of,
    geometric_counts,
    keep_count,
    kept,
    round_of,
    share,
    share_between,
)
from tokprune.errors import BudgetError

thousandths = st.integers(1, 1000).map(lambda i: i / 1000)


@given(st.integers(1, 100_000), thousandths)
def test_kept_is_the_decimal_rule(n: int, ratio: float) -> None:
    """Half up of the decimal number that was typed, not of its binary neighbour."""
    exact = (Decimal(str(ratio)) * n).quantize(Decimal(1), ROUND_HALF_UP)
    assert kept(n, ratio) == min(n, max(1, int(exact)))


@given(st.integers(1, 10_000), st.floats(1e-9, 1.0))
def test_kept_is_between_one_and_all(n: int, ratio: float) -> None:
    assert 1 <= kept(n, ratio) <= n
    assert kept(n, 1.0) == n


@given(st.integers(1, 5000), thousandths, thousandths)
def test_kept_grows_with_the_ratio(n: int, a: float, b: float) -> None:
    assert kept(n, min(a, b)) <= kept(n, max(a, b))


def test_kept_examples() -> None:
    assert kept(576, 0.1) == 58
    assert kept(25, 0.1) == 3  # 2.5 rounds up
    assert kept(100, 0.145) == 15  # 14.499999… in binary
    assert kept(3, 0.01) == 1
    assert kept(0, 0.5) == 0


def test_a_budget_counts_ahead_of_a_ratio_and_without_both_all_stay() -> None:
    assert keep_count(10) == 10
    assert keep_count(10, ratio=0.25) == 3
    assert keep_count(10, ratio=0.25, budget=4) == 4
    assert keep_count(3, budget=4) == 3


capacities = st.lists(st.integers(0, 50), min_size=1, max_size=12)
weight = st.one_of(st.floats(0, 1e3), st.sampled_from([0.0, 1e-320, 1e308, math.nan, math.inf, -1.0]))


@given(st.data())
def test_share_is_exact_and_fits(data: st.DataObject) -> None:
    caps = data.draw(capacities)
    total = data.draw(st.integers(0, sum(caps)))
    weights = data.draw(st.lists(weight, min_size=len(caps), max_size=len(caps)))
    out = share(total, weights, caps)
    assert sum(out) == total
    assert all(0 <= got <= cap for got, cap in zip(out, caps, strict=True))


@given(st.data())
def test_share_is_proportional_when_there_is_room(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=10))
    total = data.draw(st.integers(0, 500))
    out = share(total, [float(w) for w in weights], [500] * len(weights))
    for got, w in zip(out, weights, strict=True):
        assert abs(got - total * w / sum(weights)) < 1


def test_share_rounds_by_largest_remainder_and_low_index() -> None:
    assert share(10, [1, 1, 1], [10, 10, 10]) == [4, 3, 3]
    assert share(7, [0.5, 0.3, 0.2], [10, 10, 10]) == [4, 2, 1]  # 3.5 2.1 1.4
    assert share(5, torch.tensor([2.0, 1.0]), [10, 10]) == [3, 2]  # 3.33 1.67


def test_share_lets_overflow_flow_in_proportion() -> None:
    assert share(20, [8, 1, 1], [4, 20, 20]) == [4, 8, 8]
    assert share(12, [1, 0, 0], [4, 4, 4]) == [4, 4, 4]
    assert share(9, [1, 0, 0], [4, 4, 4]) == [4, 3, 2]


@given(st.data())
def test_share_between_keeps_its_bounds_and_is_proportional_among_the_others(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    least = [data.draw(st.integers(1, n)) for n in sizes]
    total = data.draw(st.integers(sum(least), sum(sizes)))
    out = share_between(total, sizes, least, sizes)
    assert sum(out) == total
    assert all(low <= got <= n for low, got, n in zip(least, out, sizes, strict=True))
    free = [i for i, got in enumerate(out) if least[i] < got]
    for i in free:  # nobody above its least has less than its part, by more than the rounding
        others = total - sum(out[j] for j in range(len(out)) if j not in free)
        assert abs(out[i] - others * sizes[i] / sum(sizes[j] for j in free)) <= 1 + 1e-9
    with pytest.raises(BudgetError, match="do not reach"):
        share_between(sum(least) - 1, sizes, least, sizes)


def test_equal_shares() -> None:
    assert equal(11, [100, 100, 100]) == [4, 4, 3]
    assert equal(11, [2, 100, 100]) == [2, 5, 4]


def test_share_refuses_what_does_not_fit() -> None:
    with pytest.raises(BudgetError, match="room for 3"):
        share(4, [1, 1], [1, 2])
    with pytest.raises(BudgetError, match="1 weights for 2"):
        share(1, [1], [1, 2])


def test_steps_are_as_equal_as_can_be_the_larger_ones_first() -> None:
    assert even_steps(7, 3) == [3, 2, 2]
    assert even_steps(7, 1) == [7]
    assert even_steps(2, 4) == [1, 1, 0, 0]
    assert even_steps(-3, 2) == [0, 0]
    assert even_steps(5, 0) == []


def test_geometric_counts_lose_the_same_share_each_time() -> None:
    assert geometric_counts(27, 8, 3) == [18, 12, 8]  # two thirds each time
    assert geometric_counts(100, 50, 2) == [71, 50]  # 100 / sqrt 2 = 70.7
    assert geometric_counts(5, 9, 2) == [5, 5]


def test_counts() -> None:
    assert counts(torch.tensor([0, 0, 2]), 4) == [2, 0, 1, 0]


@pytest.mark.parametrize("ratio", [0.001, 0.1, 1, 1.0, torch.tensor(0.5).item()])
def test_good_ratios(ratio: float) -> None:
    assert check_ratio(ratio) == float(ratio)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, math.nan, math.inf, "0.1", True, None, [0.1]])
def test_bad_ratios(ratio: object) -> None:
    with pytest.raises(BudgetError, match="ratio"):
        check_ratio(ratio)


def test_a_percentage_is_answered_with_the_share() -> None:
    with pytest.raises(BudgetError, match=r"ratio=0\.1.*budget=10"):
        check_ratio(10)


@pytest.mark.parametrize("budget", [1, 64, np.int64(3)])
def test_good_budgets(budget: int) -> None:
    assert check_budget(budget) == int(budget)


@pytest.mark.parametrize("budget", [0, -1, 1.5, 64.0, "64", True, None, math.nan])
def test_bad_budgets(budget: object) -> None:
    with pytest.raises(BudgetError, match="budget"):
        check_budget(budget)


@pytest.mark.parametrize("hundredths", range(1, 101))
def test_portions_are_of_the_decimal_number_that_was_typed(hundredths: int) -> None:
    """For every whole n and every two-digit share, although hundreds of the float products are a hair off."""
    share = hundredths / 100
    for n in range(1, 301):
        assert floor_of(n, share) == hundredths * n // 100
        assert ceil_of(n, share) == -(-hundredths * n // 100)
        assert round_of(n, share) == (2 * hundredths * n + 100) // 200
    assert floor_of(3, 1 / 3) == ceil_of(3, 1 / 3) == 1
