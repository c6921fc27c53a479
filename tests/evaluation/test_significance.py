"""The paired statistics, against values worked out by hand and by other means."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tokprune.errors import OptionError
from tokprune.evaluation.significance import compare, holm, mcnemar, paired_bootstrap, permutation_test


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (5, 1, 2 * (1 + 6) / 64),
        (3, 3, 1.0),  # both tails overlap: capped
        (2, 10, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(better, worse, p):
    assert mcnemar(better, worse) == pytest.approx(p, abs=1e-15)


def test_mcnemar_of_many_changes_is_the_normal_limit():
    p = mcnemar(900, 1100)
    z = (1100 - 900 - 1) / math.sqrt(2000)  # with continuity correction
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_permutation_counts_all_sign_patterns():
    d = [0.5, -0.25, 1.0, 0.0, 0.75]
    sums = [
        abs(sum(s * x for s, x in zip(signs, [0.5, -0.25, 1.0, 0.75], strict=True)))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    by_hand = sum(s >= 2.0 - 1e-9 for s in sums) / 16
    assert by_hand == 4 / 16  # +-(.5 -.25 +1 +.75) = 2 and +-(.5 +.25 +1 +.75) = 2.5
    assert permutation_test(d) == (by_hand, True)


def test_permutation_of_no_change_is_one():
    assert permutation_test([0.0, 0.0]) == (1.0, True)


def test_sampled_permutation_agrees_with_the_sign_test_on_equal_steps():
    d = [1.0] * 30 + [-1.0] * 14  # 44 changes of one size: flips of the mean are a sign test
    p, exact = permutation_test(d, rounds=40_000)
    assert not exact
    assert p == pytest.approx(mcnemar(30, 14), abs=0.003)


def test_bootstrap_against_the_normal_interval():
    rng = np.random.default_rng(3)
    d = rng.normal(0.1, 0.5, size=400)
    low, high = paired_bootstrap(d.tolist())
    half = 1.96 * d.std() / math.sqrt(400)
    assert low == pytest.approx(d.mean() - half, abs=0.004)
    assert high == pytest.approx(d.mean() + half, abs=0.004)
    assert paired_bootstrap(d.tolist()) == (low, high)  # seeded
    narrow = paired_bootstrap(d.tolist(), level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_is_a_resampling_of_questions():
    """The multinomial draw gives what drawing indices gives."""
    d = np.array([0.0] * 60 + [-1.0] * 30 + [1.0] * 10)
    index = np.random.default_rng(7).integers(0, len(d), size=(20_000, len(d)))
    by_index = np.quantile(d[index].mean(1), [0.025, 0.975])
    assert paired_bootstrap(d.tolist(), rounds=20_000) == pytest.approx(by_index.tolist(), abs=0.011)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_compare_pairs_by_question():
    base = {("t", i): 1.0 for i in range(10)}
    other = {("t", i): float(i >= 4) for i in reversed(range(10))} | {("t", 99): 1.0}
    found = compare(base, other)
    assert (found.n, found.unpaired, found.better, found.worse) == (10, 1, 0, 4)
    assert found.difference == pytest.approx(-0.4)
    assert found.test == "mcnemar"
    assert found.p == pytest.approx(2 / 16)
    assert found.low < -0.4 < found.high <= 0


def test_compare_of_graded_scores_permutes_signs():
    base = dict.fromkeys(range(6), 0.5)
    found = compare(base, {i: 0.5 + 0.1 * (i + 1) for i in range(6)})
    assert found.test == "sign flips"
    assert found.p == pytest.approx(2 / 64)


def test_nothing_in_common_is_an_error():
    with pytest.raises(OptionError, match="share no question"):
        compare({1: 1.0}, {2: 1.0})
    with pytest.raises(OptionError, match="finite"):
        compare({1: float("nan")}, {1: 1.0})
