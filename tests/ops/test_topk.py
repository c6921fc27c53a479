"""Top-k within groups and by tiers, against sorting in Python."""

from __future__ import annotations

import torch

from tokprune.ops.topk import (
    group_sum,
    grouped_top,
    rank_in_group,
    ranks,
    top,
    top_by_tier,
    top_in_groups,
    true_indices,
)


def coarse(*shape: int, seed: int = 0) -> torch.Tensor:
    """Scores with many ties."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_true_indices() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    assert true_indices(mask, 3).tolist() == [[1, 3, 4], [0, 2, 4]]
    assert true_indices(mask, 0).shape == (2, 0)
    assert true_indices(mask[0], 4).tolist() == [0, 1, 3, 4]


def test_ranks() -> None:
    assert ranks(torch.tensor([[0.5, 2.0, 0.5, 1.0]])).tolist() == [[2, 0, 3, 1]]
    assert ranks(torch.tensor([0.5, 2.0, 0.5, 1.0])).tolist() == [2, 0, 3, 1]


def test_top_takes_the_lower_index_of_equals_in_any_number_of_dimensions() -> None:
    scores = coarse(2, 3, 12, seed=5)
    for keep in (0, 1, 5, 12):
        rows = [sorted(sorted(range(12), key=lambda i: (-row[i], i))[:keep]) for row in scores.view(6, 12).tolist()]
        assert top(scores, keep).view(6, keep).tolist() == rows
        assert [top(row, keep).tolist() for row in scores.view(6, 12)] == rows
        distinct = scores - torch.arange(12) / 100  # no ties left: the same choice
        assert top(distinct, keep).view(6, keep).tolist() == rows


def test_top_by_tier() -> None:
    tier, scores = coarse(3, 40, seed=1).long(), coarse(3, 40, seed=2)
    for keep in (0, 1, 17, 40):
        for row, ours in enumerate(top_by_tier(tier, scores, keep).tolist()):
            order = sorted(range(40), key=lambda i: (-int(tier[row, i]), -float(scores[row, i]), i))
            assert ours == sorted(order[:keep])


def test_rank_in_group() -> None:
    scores = coarse(2, 30, seed=3)
    group = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(4))
    ours = rank_in_group(scores, group)
    for row in range(2):
        for g in range(4):
            members = [i for i in range(30) if group[i] == g]
            order = sorted(members, key=lambda i: (-float(scores[row, i]), i))
            assert ours[row, order].tolist() == list(range(len(order)))
    assert torch.equal(rank_in_group(scores, group.expand(2, 30)), ours)


def test_top_in_groups() -> None:
    scores = torch.tensor([1.0, 3, 2, 9, 8, 7])
    group = torch.tensor([0, 0, 0, 2, 2, 2])
    assert top_in_groups(scores, group, torch.tensor([2, 0, 1]), 3).tolist() == [1, 2, 3]


def test_top_in_groups_whatever_the_order_of_the_groups_and_with_ties() -> None:
    scores, quota = coarse(30, seed=6), [3, 0, 5]
    mixed = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(7))
    for group in (mixed, mixed.sort().values):
        for values in (scores, scores - torch.arange(30) / 100):
            best = []
            for g, k in enumerate(quota):
                members = [i for i in range(30) if group[i] == g]
                best += sorted(members, key=lambda i: (-float(values[i]), i))[:k]
            assert grouped_top(values, group, quota).tolist() == sorted(best)
            twice = top_in_groups(values.expand(2, 30), group, torch.tensor([quota] * 2), 8)
            assert twice.tolist() == [sorted(best)] * 2


def test_group_sum() -> None:
    values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert group_sum(values, torch.tensor([0, 1, 0, 1]), 3).tolist() == [[4, 6, 4, 6], [12, 14, 12, 14]]
