"""The device's way of sharing a budget out equals the host's."""

from __future__ import annotations

import random

import pytest
import torch

from tokprune.budget import share, share_on_device, share_out
from tokprune.testing import StandInDevice, device

BOTH = pytest.mark.parametrize("split", [share_out, share_on_device])


@BOTH
def test_equals_the_rule_on_the_host(split) -> None:  # type: ignore[no-untyped-def]
    chance = random.Random(0)
    for _ in range(300):
        members = chance.randint(1, 8)
        capacities = [chance.randint(0, 12) for _ in range(members)]
        weights = [chance.choice([0.0, 1.0, 2.0, chance.random(), chance.random() ** 8]) for _ in range(members)]
        total = chance.randint(0, sum(capacities))
        wide = torch.tensor([weights], dtype=torch.float64)
        assert split(total, wide, torch.tensor(capacities))[0].tolist() == share(total, weights, capacities)


@BOTH
def test_float32_weights_are_shared_as_on_the_host(split) -> None:  # type: ignore[no-untyped-def]
    """Products that float32 cannot hold: 2800 * 0.3 / (0.3 + 0.7 + ...) and weights near the ends of its range."""
    g = torch.Generator().manual_seed(3)
    for scale in (1.0, 1e38, 1e-38):
        weights = torch.randint(1, 40, (60, 5), generator=g) * scale / 40
        for total in (2800, 577, 119):
            expected = [share(total, row, [2880] * 5) for row in weights.tolist()]
            assert split(total, weights, torch.tensor([2880] * 5)).tolist() == expected


@BOTH
def test_float32_sums_stay_exact(split) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(1)
    weights = torch.rand(50, 16, generator=g) ** 6
    capacities = torch.randint(1, 400, (16,), generator=g)
    for total in (0, 1, 97, int(capacities.sum()) - 1, int(capacities.sum())):
        out = split(total, weights, capacities)
        assert (out.sum(-1) == total).all()
        assert (out >= 0).all()
        assert (out <= capacities).all()


@BOTH
def test_useless_weights_are_equal_ones(split) -> None:  # type: ignore[no-untyped-def]
    bad = torch.tensor([[0.0, 0, 0], [1, torch.nan, 1], [1, -1, 1], [torch.inf, 1, 1]])
    assert split(6, bad, torch.tensor([5, 5, 5])).tolist() == [[2, 2, 2]] * 4


@pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")
def test_more_members_cost_no_more_operations() -> None:
    launches = set()
    with StandInDevice() as stand_in:
        for members in (2, 5, 12):
            weights = stand_in.put(torch.rand(3, members))
            capacities = stand_in.put(torch.full((members,), 9))
            with stand_in.count() as counted:
                share_out(8 * members, weights, capacities)
            assert counted.syncs == 0
            launches.add(counted.launches)
    assert len(launches) == 1
