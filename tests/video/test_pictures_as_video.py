"""Folders of pictures and animated pictures as videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.video.backends import check
from tests.video.clips import drawn, numbers
from tokprune.errors import OptionError
from tokprune.video import VideoError, read_video

# --- pictures


def test_folder_in_natural_order(folder: Path) -> None:
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.fromarray(drawn(i)).save(pictures / f"frame{i}.png")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "notes.txt").write_text("no picture")
    video = read_video(pictures, frames=5, image_fps=3)
    check(video)
    assert video.indices.tolist() == [0, 2, 5, 8, 11]
    assert video.timestamps == pytest.approx(video.indices / 3)
    assert video.backend == "pillow"
    assert "folder" in video.reason
    (pictures / "frame5.png").write_bytes(b"broken")
    Image.fromarray(drawn(8)).resize((256, 96), Image.Resampling.NEAREST).save(pictures / "frame8.png")
    video = read_video(pictures, frames=5)
    assert video.missing == (5,)
    assert numbers(video.frames) == [0, 2, 8, 11]
    assert any("frame5.png" in w for w in video.warnings)
    assert any("size changes" in w for w in video.warnings)
    (folder / "bare").mkdir()
    with pytest.raises(VideoError, match="without pictures"):
        read_video(folder / "bare", frames=2)
    with pytest.raises(OptionError, match="backend='auto'"):
        read_video(pictures, frames=2, backend="decord")


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animation(folder: Path, kind: str) -> None:
    from PIL import Image

    path = folder / f"moving.{kind}"
    pictures = [Image.fromarray(drawn(i)) for i in range(10)]
    options = {"lossless": True} if kind == "webp" else {}
    steps = [100, 200] * 5
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=steps, loop=0, **options)
    video = read_video(path, frames=4)
    check(video)
    assert video.total == 10
    assert video.duration == pytest.approx(1.5)
    assert video.timestamps == pytest.approx([sum(steps[:i]) / 1000 for i in video.indices])


def test_still_picture(folder: Path) -> None:
    from PIL import Image

    for suffix in ("png", "jpg", "webp", "gif"):
        path = folder / f"still.{suffix}"
        Image.fromarray(drawn(1)).save(path)
        with pytest.raises(VideoError, match="still picture"):
            read_video(path, frames=2)


def test_a_folder_whose_pictures_cannot_be_read_says_why(folder: Path) -> None:
    """Such as HEIC under another name: the way out of a single picture holds for a folder of them, too."""
    bad = folder / "phone"
    bad.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (bad / name).write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(64))
    with pytest.raises(VideoError, match=r"none of its 2 pictures can be read.*HEIC.*heif-convert"):
        read_video(bad, frames=2)
