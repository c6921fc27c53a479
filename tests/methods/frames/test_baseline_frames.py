"""Evenly spaced frames, and frames by time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.methods.frames.clips import ragged, video
from tokprune.budget import weighted_shares, whole_frames
from tokprune.errors import OptionError
from tokprune.methods.frames.fps_frames import FpsFrames
from tokprune.methods.frames.uniform_frames import UniformFrames
from tokprune.video.sampling import RULES
from tokprune.video.select import even_frames


def test_whole_frames_evenly_spaced_and_one_cut() -> None:
    tokens = video(8, (3, 3))
    assert UniformFrames().allocate(tokens, 18) == [0, 0, 9, 0, 0, 0, 9, 0]
    assert UniformFrames().allocate(tokens, 22) == [0, 9, 0, 0, 9, 0, 4, 0]
    assert UniformFrames(rule="linspace").allocate(tokens, 22) == [9, 0, 0, 9, 0, 0, 0, 4]
    assert UniformFrames(spread="tokens").allocate(tokens, 20) == [3, 2, 3, 2, 3, 2, 3, 2]
    with pytest.raises(OptionError, match="middles"):
        UniformFrames(rule="midles")
    with pytest.raises(OptionError, match="frames"):
        UniformFrames(spread="whole")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["middles", *RULES])
def test_rules_give_different_frames(rule: str) -> None:
    for total in (1, 2, 5, 9, 64):
        for count in range(1, total + 1):
            found = even_frames(total, count, rule)
            assert len(found) == count
            assert sorted(set(found)) == found
            assert 0 <= found[0] <= found[-1] < total


def test_frames_of_different_sizes_take_as_few_as_hold_the_budget() -> None:
    tokens = ragged()
    sizes = tokens.layout.group_sizes
    for keep in range(1, len(tokens) + 1):
        counts = UniformFrames().allocate(tokens, keep)
        cut = [i for i, (c, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < c < n]
        assert len(cut) <= 1
    assert whole_frames(5, lambda m: [2, 0, 1][:m], [4, 4, 3]) == [2, 0, 3]


def test_frames_by_time() -> None:
    tokens = replace(video(8, (3, 3)))  # two a second
    assert FpsFrames(fps=1.0).allocate(tokens, 16) == [4, 0, 4, 0, 4, 0, 4, 0]
    assert FpsFrames(fps=0.5).allocate(tokens, 18) == [9, 0, 0, 0, 9, 0, 0, 0]
    assert FpsFrames(fps=0.5).allocate(tokens, 24) == [9, 1, 1, 1, 9, 1, 1, 1]  # more than the two can hold
    assert FpsFrames(fps=100).allocate(tokens, 16) == [2] * 8
    times = (0.0, 0.1, 0.2, 0.3, 2.0, 4.0, 4.1, 6.0)
    uneven = replace(tokens, layout=replace(tokens.layout, timestamps=times))
    assert FpsFrames(fps=0.5).allocate(uneven, 20) == [5, 0, 0, 0, 5, 5, 0, 5]
    blind = replace(tokens, layout=replace(tokens.layout, timestamps=None))
    assert FpsFrames(fps=0.25).allocate(blind, 10) == [5, 0, 0, 0, 5, 0, 0, 0]
    with pytest.raises(OptionError, match="frames per second"):
        FpsFrames(fps=0)


def test_the_minimum_goes_to_the_heaviest_first() -> None:
    assert weighted_shares(2, [0.3, 0.1, 0.2], [9, 9, 9], 1) == [1, 0, 1]
    assert weighted_shares(5, [0.3, 0.1, 0.2], [9, 1, 9], 2) == [2, 1, 2]
    assert weighted_shares(3, [0.0, 0.0, 0.0], [9, 9, 9]) == [1, 1, 1]
    assert weighted_shares(4, [math.nan, 1.0, -5.0, 1.0, math.inf], [9] * 5) == [0, 2, 0, 2, 0]
