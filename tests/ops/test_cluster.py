"""DPC-kNN against a plain loop, with masks and neighbours per row."""

from __future__ import annotations

import math

import pytest
import torch

from tokprune.ops.cluster import Distances, centre_scores, density, dpc_knn


def plain(points: list[list[float]], count: int, k: int) -> tuple[set[int], list[int]]:
    """Centres and the centre of each point, by the definition."""
    n, width = len(points), len(points[0])
    d = [[math.dist(a, b) / math.sqrt(width) for b in points] for a in points]
    rho = [math.exp(-sum(sorted(x * x for x in row)[:k]) / min(k, n)) for row in d]
    far = max(max(row) for row in d)
    delta = [min([d[i][j] for j in range(n) if rho[j] > rho[i]], default=far) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-rho[i] * delta[i], i))
    centres = sorted(order[:count])
    return set(centres), [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(n)]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_against_the_definition(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    points = torch.randn(5, 12, 4, generator=g, dtype=torch.float64)
    counts = torch.tensor([1, 2, 5, 11, 12])
    centre, into, _ = dpc_knn(points, counts, k, block=2)
    for row in range(5):
        expected, assigned = plain(points[row].tolist(), int(counts[row]), k)
        if k > 1:  # one neighbour, itself: all densities are equal, and so are the largest scores
            assert set(centre[row].nonzero()[:, 0].tolist()) == expected
            assert into[row].tolist() == assigned
        else:
            assert centre[row].nonzero()[:, 0].tolist() == list(range(int(counts[row])))


def test_invalid_points_are_not_there() -> None:
    g = torch.Generator().manual_seed(9)
    points = torch.randn(4, 10, 3, generator=g)
    valid = torch.rand(4, 10, generator=g) > 0.4
    valid[3] = False
    counts = torch.tensor([2, 3, 1, 0])
    centre, into, score = dpc_knn(points, counts, 4, valid)
    for row in range(3):
        spots = valid[row].nonzero()[:, 0]
        alone = dpc_knn(points[row, spots][None], counts[row][None], 4)
        assert torch.equal(centre[row, spots], alone[0][0])
        assert torch.equal(into[row, spots], spots[alone[1][0]])
        torch.testing.assert_close(score[row, spots], alone[2][0])
        assert not centre[row, ~valid[row]].any()
        assert (into[row, ~valid[row]] == -1).all()
        assert (score[row, ~valid[row]] == -1).all()
    assert (into[3] == -1).all()


def test_neighbours_may_differ_between_rows() -> None:
    points = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(4))
    distance = Distances(points)
    (every,) = distance.parts
    k = torch.tensor([1, 4, 7])
    for row in range(3):
        one = density(Distances(points[row : row + 1])[every], int(k[row]))
        torch.testing.assert_close(density(distance[every], k)[row], one[0])
        torch.testing.assert_close(
            centre_scores(distance, k)[row], centre_scores(Distances(points[row : row + 1]), int(k[row]))[0]
        )


def test_duplicates_take_the_lower_index() -> None:
    centre, into, _ = dpc_knn(torch.ones(1, 6, 3), torch.tensor([2]), 3)
    assert centre[0].tolist() == [True, True, False, False, False, False]
    assert into[0].tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("n", [20, 60])
def test_two_points_nearest_to_each_other_are_equally_dense(n: int) -> None:
    points = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(n)) + 3
    rho = density(Distances(points)[slice(0, n)], 2)[0]
    nearest = torch.cdist(points[0], points[0]).fill_diagonal_(torch.inf).argmin(-1)
    mutual = nearest[nearest] == torch.arange(n)
    assert mutual.sum() > 3
    assert torch.equal(rho[mutual], rho[nearest][mutual])


def test_copies_of_a_point_do_not_take_the_centres_of_others() -> None:
    points = torch.tensor([[[0.0, 0.0]] * 5 + [[3.0, 4.0]] + [[-6.0, 8.0]] * 2])
    centre, into, _ = dpc_knn(points, torch.tensor([3]), 2)
    assert centre[0].nonzero()[:, 0].tolist() == [0, 5, 6]
    assert into[0].tolist() == [0] * 5 + [5, 6, 6]


def test_half_precision_is_clustered_in_float32() -> None:
    points = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(5)).bfloat16()
    half, wide = (dpc_knn(p, torch.tensor([2, 3]), 3) for p in (points, points.float()))
    assert half[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(half, wide, strict=True))


def test_rows_are_clustered_block_by_block() -> None:
    """More rows than one block holds, and than a row has points."""
    points = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(6))
    counts = torch.tensor([1, 2, 3, 1, 2, 3, 1])
    for k in (2, counts):
        once, apart = (dpc_knn(points, counts, k, block=block) for block in (16, 2))
        assert once[0].shape == (7, 3)
        assert all(torch.equal(a, b) for a, b in zip(once, apart, strict=True))
