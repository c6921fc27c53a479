"""Files that many tests of this folder read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.video.clips import cut, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """240 frames, 8 s, key frames every 24, B-frames."""
    return write(folder / "clip.mp4", 240)


@pytest.fixture(scope="module")
def edited(clip: Path, folder: Path) -> Path:
    """The clip without its first 34 frames, which stay in the file."""
    return cut(clip, folder / "edited.mp4", 34)
