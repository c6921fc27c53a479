"""Problems of equal shapes are solved in one call, and nobody's answer depends on who else is in it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.methods.base import picked, solve_alike


def test_equal_shapes_share_a_call_and_answers_stay_in_order() -> None:
    calls: list[tuple[int, ...]] = []

    def best(values: Tensor, offset: Tensor, keep: int) -> Tensor:
        calls.append((*values.shape, keep))
        return values.topk(keep).indices + offset[:, :1]

    g = torch.Generator().manual_seed(0)
    sizes = [(6, 2), (5, 2), (6, 2), (6, 3), (5, 2)]
    problems = [([torch.rand(n, generator=g), torch.full((n,), i)], k) for i, (n, k) in enumerate(sizes)]
    answers = solve_alike(problems, best)
    assert calls == [(2, 6, 2), (2, 5, 2), (1, 6, 3)]
    for i, (([values, _], keep), answer) in enumerate(zip(problems, answers, strict=True)):
        assert torch.equal(answer, values.topk(keep).indices + i)


def test_other_types_are_other_problems() -> None:
    types: list[torch.dtype] = []

    def first(x: Tensor, keep: int) -> Tensor:
        types.append(x.dtype)
        return torch.zeros(len(x), keep, dtype=torch.long)

    solve_alike([([torch.zeros(3)], 1), ([torch.zeros(3, dtype=torch.float64)], 1)], first)
    assert types == [torch.float32, torch.float64]
    assert solve_alike([], first) == []


def test_picks_of_parts_become_indices_of_streams() -> None:
    picks = [torch.tensor([2, 0]), torch.tensor([1]), torch.tensor([0, 1])]
    found = picked(picks, [(0, 4), (1, 0), (0, 0)], 2)
    assert [f.tolist() for f in found] == [[0, 1, 4, 6], [1]]
