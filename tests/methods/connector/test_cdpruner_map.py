"""Greedy MAP of a determinantal point process."""

from __future__ import annotations

import pytest
import torch

from tokprune.methods.connector.cdpruner import _kernel, cdpruner, greedy_map, quality


def kernel(n: int, d: int, seed: int) -> torch.Tensor:
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    return x @ x.transpose(1, 2)


def test_each_pick_maximises_the_determinant() -> None:
    matrix = kernel(12, 20, 0)
    order = greedy_map(matrix, 9, torch.zeros(2, 12))
    for m, picks in zip(matrix.double(), order.tolist(), strict=True):
        for k in range(9):
            before = picks[:k]
            volume = {
                j: torch.linalg.det(m[[*before, j]][:, [*before, j]]).item() for j in range(12) if j not in before
            }
            assert picks[k] == max(volume, key=volume.__getitem__)


def test_all_tokens_once_beyond_the_rank() -> None:
    """Rank 3: after three picks the fallback decides, though rounding leaves some volume everywhere."""
    fallback = torch.rand(2, 40, generator=torch.Generator().manual_seed(3))
    order = greedy_map(kernel(40, 3, 1), 40, fallback)
    for picks, scores in zip(order.tolist(), fallback.tolist(), strict=True):
        assert sorted(picks) == list(range(40))
        assert picks[3:] == sorted(picks[3:], key=lambda j: -scores[j])


def test_a_zero_kernel_is_the_fallback() -> None:
    order = greedy_map(torch.zeros(1, 5, 5), 5, torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0]]))
    assert order.tolist() == [[1, 2, 4, 0, 3]]


def test_small_scales_are_no_noise() -> None:
    """A kernel in tiny units is chosen from like the same kernel in large ones."""
    matrix = kernel(30, 16, 2)
    fallback = torch.zeros(2, 30)
    assert torch.equal(greedy_map(matrix, 12, fallback), greedy_map(matrix * 2.0**-40, 12, fallback))


@pytest.mark.parametrize("kind", ["random", "repeated", "zeros", "equal weights", "low rank"])
def test_a_part_of_the_kernel_chooses_as_the_whole(kind: str) -> None:
    """Heaviest tokens alone, picture by picture or in a batch, against all; where part is not enough, all are taken."""
    seed = torch.Generator().manual_seed(3)
    x = torch.randn(3, 300, 6 if kind == "low rank" else 48, generator=seed)
    if kind == "repeated":
        x = x[:, torch.randint(300, (300,), generator=seed)]
    elif kind == "zeros":
        x[:, ::3] = 0
    relevance = torch.randn(3, 300, generator=seed) * torch.tensor([1.0, 0.2, 3.0])[:, None]
    weight = quality(torch.zeros(3, 300) if kind == "equal weights" else relevance)
    for keep in (5, 30, 50):
        found = cdpruner(x, weight, keep)
        assert torch.equal(found, greedy_map(_kernel(x, weight), keep, weight))
        assert torch.equal(found[1:2], cdpruner(x[1:2], weight[1:2], keep))
