"""Frames of a video: neighbours in time, cuts into segments."""

from __future__ import annotations

import pytest
import torch

from tests.methods.connector.clips import uneven
from tests.methods.streams import LAYOUTS
from tokprune.budget import equal_spaced, in_proportion
from tokprune.ops.frames import (
    earlier,
    frame_means,
    raster,
    run_lengths,
    segment_numbers,
    similar_runs,
    similarity_to,
    still_and_moving,
)


def test_numbers_and_runs_undo_each_other() -> None:
    assert segment_numbers([2, 1, 3]).tolist() == [0, 0, 1, 2, 2, 2]
    assert run_lengths(segment_numbers([2, 1, 3]).tolist()) == [2, 1, 3]


def test_cuts_are_the_union_of_lowest_and_below_the_threshold() -> None:
    frames = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.3], [0, 1], [0.1, 1], [1, 0]])
    assert similar_runs(frames, 0, 0.9) == [3, 2, 1]
    assert similar_runs(frames, 1, -1.0) == [5, 1]
    assert similar_runs(frames, 3, 0.9) == [2, 1, 2, 1]
    assert similar_runs(frames, 99, 0.9) == [1] * 6
    assert similar_runs(frames[:1], 7, 0.9) == [1]
    assert similar_runs(torch.eye(2), 0, 0.0) == [2]  # at the threshold is not below it


def test_raster_of_full_frames_counts_through() -> None:
    assert torch.equal(raster(LAYOUTS["video"]), torch.arange(60).view(5, 12))


def test_raster_and_predecessors_of_uneven_frames() -> None:
    layout = uneven([(3, 4), (2, 4), (3, 3)], holes=6).layout
    places = raster(layout)
    assert places.shape == (3, 12)
    assert sorted(places[places >= 0].tolist()) == list(range(len(layout.group)))
    at = {
        (int(g), int(r), int(c)): i
        for i, (g, r, c) in enumerate(zip(layout.group, layout.row, layout.col, strict=True))
    }
    for step in (1, 2):
        expected = [
            at.get((int(g) - step, int(r), int(c)), -1)
            for g, r, c in zip(layout.group, layout.row, layout.col, strict=True)
        ]
        assert earlier(layout, step).tolist() == expected


def test_each_frame_may_look_back_differently() -> None:
    back = earlier(LAYOUTS["video"], torch.tensor([0, 1, 2, 1, 0])).view(5, 12)
    assert (back[0] == -1).all()
    assert (back[4] == -1).all()
    assert torch.equal(back[1], torch.arange(12))
    assert torch.equal(back[2], torch.arange(12))
    assert torch.equal(back[3], torch.arange(24, 36))


@pytest.mark.parametrize("where", ["image", "tiles", "unpadded"])
def test_pictures_and_tiles_have_no_past(where: str) -> None:
    assert (earlier(LAYOUTS[where]) == -1).all()


def test_similarity_in_blocks() -> None:
    g = torch.Generator().manual_seed(0)
    features, other = torch.randn(50, 8, generator=g), torch.randint(-1, 50, (50,), generator=g)
    found = similarity_to(features, other, -2.0, block=7)
    expected = torch.nn.functional.cosine_similarity(features, features[other.clamp(min=0)])
    torch.testing.assert_close(found, torch.where(other >= 0, expected, -2.0))


def test_frame_means() -> None:
    tokens = uneven([(2, 2), (1, 3)])
    found = frame_means(tokens.features, tokens.layout)
    torch.testing.assert_close(found, torch.stack([tokens.features[:4].mean(0), tokens.features[4:].mean(0)]))
    assert frame_means(tokens.features.bfloat16(), tokens.layout).dtype == torch.float32
    assert frame_means(tokens.features.double(), tokens.layout).dtype == torch.float64


def test_pools_of_a_still_and_a_moving_place() -> None:
    """Two frames of two places in one scene; the first place is still and stands in the first frame."""
    place = torch.tensor([[0, 1], [2, 3]])
    pools = still_and_moving(place, 4, [2], torch.tensor([[0.9, 0.1]]), 0.5)
    assert pools.sizes.tolist() == [1, 1, 1]
    assert pools.order.tolist() == [2, 0, 1]
    assert pools.home.tolist() == [[0, 1], [2, 3], [0, 1]]
    assert pools.shares(2).tolist() == [0, 1, 1]  # 2/3, 4/3, 6/3 rounded, in the order of the stream
    assert pools.means(torch.tensor([[1.0], [2.0], [3.0], [8.0]])).tolist() == [[[2.0], [5.0]]]
    into = torch.tensor([[-1, -1], [-1, 1], [0, -1]])
    target, weight = pools.flow(into, torch.ones(3, 2))
    assert target.tolist() == [0, -1, 0, 3]
    assert weight.tolist() == [0.5, 0.0, 0.5, 1.0]


def test_still_places_move_again_where_the_pools_hold_too_little() -> None:
    place, alike = torch.arange(6).view(2, 3), torch.tensor([[0.9, 0.8, 0.1]])
    stills = [still_and_moving(place, 6, [2], alike, 0.5, at_least=n).still.tolist() for n in (4, 5, 6)]
    assert stills == [[[True, True, False]], [[True, False, False]], [[False] * 3]]
    assert not still_and_moving(place, 6, [1, 1], alike.expand(2, 3), 0.5).still.any()  # scenes of one frame
    assert still_and_moving(place, 6, [2], alike, 0.8).still.tolist() == [[True, False, False]]  # above, not at


def test_spread_is_exact_and_even() -> None:
    assert equal_spaced(3, [10] * 9) == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert equal_spaced(20, [10] * 9) == [2, 2, 3, 2, 2, 2, 3, 2, 2]
    assert equal_spaced(7, [1, 5, 5]) == [1, 3, 3]
    g = torch.Generator().manual_seed(1)
    for _ in range(300):
        caps = torch.randint(0, 6, (7,), generator=g).tolist()
        total = int(torch.randint(0, sum(caps) + 1, (1,), generator=g))
        shares = equal_spaced(total, caps)
        assert sum(shares) == total
        assert all(0 <= k <= cap for k, cap in zip(shares, caps, strict=True))
        free = [k for k, cap in zip(shares, caps, strict=True) if k < cap]
        assert max(free, default=0) >= max(shares) - 1 if free else True


def test_in_proportion_is_exact_in_every_group() -> None:
    g = torch.Generator().manual_seed(2)
    for _ in range(300):
        sizes = torch.randint(0, 9, (12,), generator=g)
        group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3])
        whole = torch.zeros(4, dtype=torch.long).index_add(0, group, sizes)
        totals = (torch.rand(4, generator=g) * (whole + 1)).long().minimum(whole)
        shares = in_proportion(totals, sizes, group)
        assert torch.equal(torch.zeros(4, dtype=torch.long).index_add(0, group, shares), totals)
        assert (shares >= 0).all()
        assert (shares <= sizes).all()
        wish = totals[group] * sizes / whole[group].clamp(min=1)
        assert (shares - wish).abs().max() <= 1
    assert in_proportion(5, torch.tensor([10] * 10)).tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
