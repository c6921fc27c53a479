"""Greedy coverage against the rule written out."""

from __future__ import annotations

from unittest.mock import patch

import torch

from tokprune.ops import select
from tokprune.ops.select import greedy_coverage, greedy_coverage_gains


def written_out(s, keep, weights, start, bonus):  # type: ignore[no-untyped-def]
    best, chosen, gains = start.clone(), [], []
    for _ in range(keep):
        gain = weights * (s - best[:, None]).clamp_min(0).sum(0) + bonus
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        gains.append(gain[chosen[-1]].item())
        best = torch.maximum(best, s[:, chosen[-1]])
    return chosen, gains


def lazily(s, keep, *given, **named):  # type: ignore[no-untyped-def]
    """As a large matrix is treated on a CPU."""
    with patch.object(select, "LAZY", 0):
        return greedy_coverage_gains(s, keep, *given, **named)


def test_rule_with_weights_start_and_bonus() -> None:
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(3, 7, 20, generator=generator, dtype=torch.float64)
    weights, bonus = torch.rand(3, 20, generator=generator).double(), torch.rand(3, 20, generator=generator).double()
    start = torch.rand(3, 7, generator=generator).double()
    for solve in (greedy_coverage_gains, lazily):
        order, gains = solve(s, 15, weights, start, bonus)
        for b in range(3):
            chosen, added = written_out(s[b], 15, weights[b], start[b], bonus[b])
            assert order[b].tolist() == chosen
            torch.testing.assert_close(gains[b], torch.tensor(added, dtype=torch.float64))


def test_saturated_rows_still_give_distinct_picks() -> None:
    order = greedy_coverage(torch.ones(1, 4, 6), 6)
    assert order.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_negative_similarities_and_weights_of_zero() -> None:
    order = greedy_coverage(-torch.ones(1, 4, 5), 5, torch.zeros(1, 5))
    assert sorted(order[0].tolist()) == [0, 1, 2, 3, 4]


def test_barred_columns_come_last() -> None:
    s = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(1))
    barred = torch.tensor([[True, False, True, False, False, False]])
    order = greedy_coverage(s, 6, barred=barred)[0].tolist()
    assert set(order[4:]) == {0, 2}


def test_inputs_are_left_alone() -> None:
    s = torch.rand(1, 5, 6, requires_grad=True)
    start = torch.zeros(1, 5)
    kept = s.detach().clone()
    greedy_coverage(s, 3, start=start)
    assert torch.equal(s.detach(), kept)
    assert not start.any()


def test_gains_carry_no_gradient() -> None:
    s, start, weights, bonus = (torch.rand(1, *shape, requires_grad=True) for shape in ((5, 6), (5,), (6,), (6,)))
    for given in ({}, {"weights": weights}, {"start": start}, {"bonus": bonus}):
        assert not greedy_coverage_gains(s, 3, **given)[1].requires_grad


def test_repeated_columns_and_barred_ones_go_by_the_lower_index() -> None:
    """Gains made anew only where they may be the largest, against all gains at every pick."""
    generator = torch.Generator().manual_seed(3)
    few = torch.randint(0, 4, (9, 11), generator=generator).double()
    s = few[:, torch.randint(11, (70,), generator=generator)][None]  # every column some six times
    start, weights = torch.zeros(9).double(), torch.ones(70).double()
    chosen, added = written_out(s[0], 70, weights, start, torch.zeros(70))
    for order, gains in (greedy_coverage_gains(s, 70), lazily(s, 70)):
        assert order[0].tolist() == chosen
        assert gains[0].tolist() == added
    barred = torch.rand(1, 70, generator=generator) < 0.5
    order = greedy_coverage(s, 70, barred=barred)[0]
    assert torch.equal(order, lazily(s, 70, barred=barred)[0][0])
    assert torch.equal(greedy_coverage_gains(s, 70, barred=barred)[1], lazily(s, 70, barred=barred)[1])
    free = int((~barred).sum())
    assert order[:free].tolist() == [
        i for i in greedy_coverage(s.masked_fill(barred[:, None], 0), 70)[0].tolist() if not barred[0, i]
    ]
    assert order[free:].tolist() == barred[0].nonzero()[:, 0].tolist()
