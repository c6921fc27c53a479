"""Cosines and nearest neighbours, against search in Python."""

from __future__ import annotations

import pytest
import torch

from tokprune.methods.connector.prumerge import neighbour_rows
from tokprune.ops import blocks
from tokprune.ops.similarity import cosine_distance, cosine_similarity, distances, gram, most_similar, unit


def test_unit_rows_are_float32_or_wider_and_zero_rows_stay() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.testing.assert_close(unit(rows.to(dtype)), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert unit(rows.double()).dtype == torch.float64


def test_cosines_of_pairs() -> None:
    a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [-5.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(cosine_similarity(a, b), torch.tensor([[0.0, -1.0, 0.0], [0.8, -0.6, 0.0]]))
    torch.testing.assert_close(cosine_distance(a), torch.tensor([[0.0, 0.4], [0.4, 0.0]]))
    many = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(gram(many), many @ many.transpose(1, 2))


def test_gradients_pass_through_cosines_of_many_and_of_few() -> None:
    for n in (2, 300):
        x = torch.randn(n, 4, generator=torch.Generator().manual_seed(3))
        plain, x = cosine_distance(x), x.requires_grad_()
        tracked = cosine_distance(x)
        torch.testing.assert_close(tracked, plain)
        (slope,) = torch.autograd.grad(tracked[0, 1], x)
        (expected,) = torch.autograd.grad(1 - torch.cosine_similarity(x[0], x[1], dim=0), x)
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("rows", [3, 512])
def test_the_most_similar_row_is_found_block_by_block(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WHOLE", 4 if rows < 512 else blocks.WHOLE)
    monkeypatch.setattr(blocks, "ROWS", rows)
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 8, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    barred = torch.tensor([False, True, False, False, True])
    for bar in (None, barred):
        value, place = most_similar(a, b, bar)
        product = a @ b.mT
        expected = product if bar is None else product[..., ~bar]
        torch.testing.assert_close(value, expected.amax(-1))
        torch.testing.assert_close(product.gather(-1, place[..., None])[..., 0], value)
        assert bar is None or not torch.isin(place, torch.tensor([1, 4])).any()
    assert most_similar(torch.ones(1, 8, 3), torch.ones(1, 5, 3))[1].tolist() == [[0] * 8]


def test_neighbour_rows() -> None:
    g = torch.Generator().manual_seed(1)
    keys, weights = torch.randn(2, 12, 4, generator=g), torch.rand(2, 12, generator=g)
    kept = torch.tensor([[2, 5], [11, 0]])
    rows = neighbour_rows(keys, kept, weights, 3)
    for b in range(2):
        for k, i in enumerate(kept[b].tolist()):
            cosine = torch.cosine_similarity(keys[b], keys[b, i : i + 1], dim=-1)
            nearest = sorted((j for j in range(12) if j != i), key=lambda j: -float(cosine[j]))[:3]
            expected = torch.zeros(12)
            expected[nearest] = weights[b, nearest]
            expected[i] = 1.0
            assert torch.equal(rows[b, k], expected)


def test_distances_do_not_drown_in_what_all_rows_share() -> None:
    rows = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    shared = torch.tensor([1000.0, 0, 0, -3000, 0, 0])
    exact = torch.cdist(rows.double(), rows[:, :30].double())
    torch.testing.assert_close(distances(rows + shared, rows[:, :30] + shared).double(), exact, atol=2e-3, rtol=0)


def test_fewer_tokens_than_neighbours() -> None:
    rows = neighbour_rows(torch.ones(1, 3, 2), torch.tensor([[1]]), torch.full((1, 3), 0.5), 32)
    assert rows.tolist() == [[[0.5, 1.0, 0.5]]]
    assert neighbour_rows(torch.ones(1, 1, 2), torch.tensor([[0]]), torch.ones(1, 1), 32).tolist() == [[[1.0]]]
