"""Pictures of a wanted number of tokens: found where sizes allow, the nearest elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokprune.errors import OptionError
from tokprune.profiling.presets import preset
from tokprune.profiling.resize import at_count, preset_size, scaled_frames, shrinking


def patches(factor: float) -> dict[str, Any]:
    """A made-up processor: 40 x 30 patches at factor 1, whole patches only."""
    return {"tokens": max(1, int(40 * factor)) * max(1, int(30 * factor))}


def count(inputs: Any) -> int:
    return int(inputs["tokens"])


@pytest.mark.parametrize("wanted", [1, 12, 300, 1200, 5000, 100_000])
def test_the_search_comes_near_at_any_size(wanted: int) -> None:
    inputs, got = at_count(patches, count, wanted)
    assert got == count(inputs)
    assert abs(got - wanted) <= max(2, 0.05 * wanted)


def test_fixed_processors_give_what_they_give() -> None:
    asked: list[float] = []

    def fixed(factor: float) -> dict[str, Any]:
        asked.append(factor)
        return {"tokens": 576}

    assert at_count(fixed, count, 100) == ({"tokens": 576}, 576)
    assert len(asked) <= 4  # it soon sees that nothing changes


def test_shares_are_of_the_full_size() -> None:
    smaller = shrinking(patches, count)
    assert count(smaller(0.25)) == pytest.approx(300, rel=0.05)
    with pytest.raises(OptionError, match="at least 1"):
        at_count(patches, count, 0)


def test_frames_scale_together() -> None:
    frames = np.zeros((3, 40, 60, 3), dtype=np.uint8)
    assert scaled_frames(frames, 0.5).shape == (3, 20, 30, 3)
    assert scaled_frames(frames, 0.001).shape == (3, 16, 16, 3)
    assert scaled_frames(frames[:, :8], 0.001).shape == (3, 8, 16, 3)


@pytest.mark.parametrize(
    ("name", "wanted", "near"),
    [
        ("qwen2.5-vl-7b", 1000, 0.02),
        ("qwen3-vl-8b", 300, 0.05),
        ("internvl3-8b", 1800, 0.02),
        ("llava-1.5-7b", 100, 9.0),
    ],
)
def test_sizes_of_presets(name: str, wanted: int, near: float) -> None:
    known = preset(name)
    size, got = preset_size(known, wanted)
    assert known.tokens(size) == got
    assert abs(got - wanted) <= near * wanted
    with pytest.raises(OptionError, match="at least 1"):
        preset_size(known, 0)
