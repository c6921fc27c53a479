"""The baselines: everything, a random subset, a regular grid."""

from __future__ import annotations

import pytest
import torch

from tokprune.errors import OptionError
from tokprune.methods.connector.none import NoPruning
from tokprune.methods.connector.random import Random
from tokprune.methods.connector.uniform import Uniform, uniform
from tokprune.tokens import Layout, VisualTokens


def stream(layout: Layout) -> VisualTokens:
    return VisualTokens(torch.randn(len(layout.group), 4), layout)


def test_none_keeps_everything_whatever_the_budget() -> None:
    for keep in (1, 7, 12):
        assert NoPruning().select(stream(Layout.grid(3, 4)), keep).indices.tolist() == list(range(12))
    assert not NoPruning().exact


def test_random_depends_on_seed_and_length_alone() -> None:
    a, b = stream(Layout.grid(8, 8)), stream(Layout.grid(8, 8))
    first = Random(seed=3).select(a, 10).indices
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first, Random(seed=3).select(b, 10).indices)
    assert not torch.equal(first, Random(seed=4).select(a, 10).indices)
    assert set(first.tolist()) < set(Random(seed=3).select(a, 20).indices.tolist())


def test_random_leaves_the_global_generator_alone() -> None:
    tokens = stream(Layout.grid(4, 4))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Random().select(tokens, 3)
    assert torch.equal(torch.rand(3), expected)


def test_random_is_fair() -> None:
    tokens = stream(Layout.grid(1, 10))
    hits = torch.zeros(10)
    for seed in range(400):
        hits[Random(seed=seed).select(tokens, 5).indices] += 1
    assert hits.min() > 150  # 200 expected, five standard deviations below
    assert hits.max() < 250


def test_random_seed_is_a_whole_number() -> None:
    with pytest.raises(OptionError, match=r"seed=1\.5"):
        Random(seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grid", "keep", "rows", "cols"),
    [
        ((4, 4), 4, [0, 2], [0, 2]),
        ((24, 24), 64, list(range(1, 24, 3)), list(range(1, 24, 3))),
        ((6, 12), 8, [1, 4], [1, 4, 7, 10]),
    ],
)
def test_uniform_is_a_regular_grid(grid: tuple[int, int], keep: int, rows: list[int], cols: list[int]) -> None:
    expected = [r * grid[1] + c for r in rows for c in cols]
    assert Uniform().select(stream(Layout.grid(*grid)), keep).indices.tolist() == expected


@pytest.mark.parametrize("keep", [5, 58, 144, 200, 331, 575])
def test_uniform_spreads_evenly(keep: int) -> None:
    """No window of the picture is much fuller or emptier than its share."""
    layout = Layout.grid(24, 24)
    mask = torch.zeros(576).index_fill(0, uniform(layout, [keep]), 1.0).reshape(24, 24)
    for top in range(0, 24, 12):
        for left in range(0, 24, 12):
            inside = float(mask[top : top + 12, left : left + 12].sum())
            assert abs(inside - keep / 4) <= 2 + 0.08 * keep


def test_uniform_gives_tiles_and_frames_their_share() -> None:
    layout = Layout.grid(4, 4, 3, "video")
    indices = Uniform().select(stream(layout), 12).indices
    assert torch.bincount(layout.group[indices]).tolist() == [4, 4, 4]
    assert indices[:4].tolist() == [0, 2, 8, 10]


def test_uniform_respects_holes() -> None:
    full = Layout.grid(6, 6, 2, "tiles")
    present = torch.cat([torch.arange(36), 36 + torch.arange(12, 36)])  # the second tile lost its two upper rows
    layout = Layout(full.group[present], full.row[present], full.col[present], full.grids, "tiles")
    for keep in (1, 2, 15, 31, 59, 60):
        indices = Uniform().select(stream(layout), keep).indices
        assert len(indices.unique()) == keep
    assert torch.bincount(layout.group[Uniform().select(stream(layout), 15).indices]).tolist() == [9, 6]
