"""The line of a report that says how a video's budget fell on its frames."""

from __future__ import annotations

import pytest

from tokprune.report import StreamReport


def line(*frames: int) -> str:
    return StreamReport(0, "video", 100, sum(frames), 0, 0, frames=frames).frames_line


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        ((4, 0, 16, 64), "3 of 4 frames kept, 4 / 16 / 64 tokens each (least / median / most)"),
        ((1, 2, 3, 4), "4 of 4 frames kept, 1 / 2.5 / 4 tokens each (least / median / most)"),
        ((8, 8, 0), "2 of 3 frames kept, 8 tokens each"),
        ((5,), "1 of 1 frames kept, 5 tokens each"),
    ],
)
def test_frames_line(frames: tuple[int, ...], wanted: str) -> None:
    assert line(*frames) == wanted


def test_pictures_have_no_frames() -> None:
    assert StreamReport(0, "image", 100, 10, 0, 0).frames_line == ""
