"""Groups of equal size and budget are batched, each token of the stream at most once."""

from __future__ import annotations

from tokprune.ops.stacks import stacks


def test_groups_that_share_everything_share_a_call() -> None:
    found = stacks([2, 3, 2, 3, 0, 3], [1, 2, 1, 1, 0, 2], "cpu")
    assert [(s.where.tolist(), s.keep) for s in found] == [
        ([[0, 1], [5, 6]], 1),
        ([[2, 3, 4], [10, 11, 12]], 2),
        ([[7, 8, 9]], 1),
    ]


def test_groups_without_a_budget_are_left_out() -> None:
    assert [s.where.tolist() for s in stacks([2, 2], [0, 2], "cpu")] == [[[2, 3]]]


def test_labels_keep_groups_apart() -> None:
    found = stacks([4, 4, 4], [2, 2, 2], "cpu", [(2, 2), (1, 4), (2, 2)])
    assert [(s.where[:, 0].tolist(), s.label) for s in found] == [([0, 8], (2, 2)), ([4], (1, 4))]
