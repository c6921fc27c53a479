"""Exact frames out of every kind of file: rates, edit lists, rotations, codecs, containers, sizes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.video.backends import BACKENDS, check
from tests.video.clips import av, drawn, numbers, turned, write
from tokprune.video import VideoError, read_video, scan
from tokprune.video.index import PacketIndex


def uneven(count: int) -> list[int]:
    """Millisecond times with steps of 40, 10, 17 and 83."""
    return np.cumsum([0] + [(40, 10, 17, 83)[i % 4] for i in range(count - 1)]).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_exact_on_variable_rate(folder: Path, backend: str, suffix: str) -> None:
    path = folder / f"vfr.{suffix}"
    ticks = uneven(120)
    if not path.exists():
        write(path, 120, ticks=ticks, time_base=Fraction(1, 1000))
    video = read_video(path, frames=32, backend=backend)
    check(video)
    assert video.total == 120
    assert video.timestamps == pytest.approx([ticks[i] / 1000 for i in video.indices], abs=1e-3)
    assert video.fps == pytest.approx(119 / (ticks[-1] / 1000), rel=1e-3)
    by_time = read_video(path, fps=5, backend=backend)
    check(by_time)
    for at, i in enumerate(by_time.indices):
        assert ticks[i] / 1000 <= at / 5 + 1e-3
        assert i + 1 == 120 or ticks[i + 1] / 1000 > at / 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_start_time_is_not_an_index(folder: Path, backend: str) -> None:
    path = write(folder / "late.mp4", 60, ticks=[150 + i for i in range(60)])
    video = read_video(path, frames=8, backend=backend)
    check(video)
    assert video.timestamps[0] == 0
    assert video.total == 60


def test_edit_list(edited: Path) -> None:
    index = scan(edited)
    assert isinstance(index, PacketIndex)
    assert index.hidden == 10  # since the key frame at 24; the demuxer drops the group before it
    video = read_video(edited, frames=32)
    assert numbers(video.frames) == (video.indices + 34).tolist()
    assert video.total == 206
    assert video.timestamps[0] == 0
    assert "edit list" in video.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_edit_list_in_other_backends(edited: Path, backend: str) -> None:
    if backend == "decord":
        with pytest.raises(VideoError, match=r"edit list that hides 10 frames.*backend='pyav'"):
            read_video(edited, frames=8, backend=backend)
        return
    video = read_video(edited, frames=8, backend=backend)
    assert numbers(video.frames) == (video.indices + 34).tolist()


# Display matrices (a, b, c, d), and what must be done with an upright picture so that the matrix makes it upright
# again.
MATRICES = {
    "quarter": ((0, 1, -1, 0), lambda f: np.rot90(f, 1)),
    "half": ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
    "three quarters": ((0, -1, 1, 0), lambda f: np.rot90(f, 3)),
    "mirror": ((-1, 0, 0, 1), lambda f: f[:, ::-1]),
    "upside-down": ((1, 0, 0, -1), lambda f: f[::-1]),
    "transpose": ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MATRICES)
def test_rotation(folder: Path, backend: str, kind: str) -> None:
    matrix, back = MATRICES[kind]
    path = folder / f"{kind}.mp4"
    if not path.exists():
        plain = folder / f"plain {kind}.mp4"
        with av.open(str(plain), "w") as out:
            stored = back(drawn(0))
            stream = out.add_stream("libx264", rate=30)
            stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
            for i in range(9):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(back(drawn(i))), format="rgb24")
                frame.pts = i
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        turned(plain, path, matrix)
    if backend != "pyav" and kind in ("mirror", "upside-down", "transpose"):
        with pytest.raises(VideoError, match="mirrored"):
            read_video(path, frames=4, backend=backend)
        return
    video = read_video(path, frames=4, backend=backend)
    check(video)
    assert video.size == (48, 128)
    assert np.abs(video.frames[0].astype(int) - drawn(0)).mean() < 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("height", "width", "codec", "pix_fmt", "suffix"),
    [
        (49, 131, "libx264", "yuv444p", "mp4"),
        (51, 129, "libvpx-vp9", "yuv420p", "webm"),
        (48, 150, "mpeg4", "yuv420p", "avi"),
    ],
)
def test_odd_sizes_and_codecs(
    folder: Path, backend: str, height: int, width: int, codec: str, pix_fmt: str, suffix: str
) -> None:
    path = folder / f"odd{height}.{suffix}"
    if not path.exists():
        fast = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {}
        write(path, 40, height=height, width=width, codec=codec, pix_fmt=pix_fmt, options=fast)
    video = read_video(path, frames=9, backend=backend)
    check(video)
    assert video.frames.shape[1:] == (height, width, 3)
    assert video.total == 40


@pytest.mark.parametrize(
    ("suffix", "options", "container"),
    [
        ("ts", {}, {}),
        ("flv", {}, {}),
        ("mkv", {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}, {}),
        ("mp4", {}, {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", {"x264-params": "intra-refresh=1"}, {}),
        ("h264", {}, {}),
    ],
)
def test_containers(folder: Path, suffix: str, options: dict[str, str], container: dict[str, str]) -> None:
    path = write(folder / f"kind.{suffix}", 90, options=options, container=container)
    for wanted in (5, [70], [89, 30]):
        video = read_video(path, frames=wanted)
        check(video)
    assert video.total == 90
    assert suffix == "h264" or video.duration == pytest.approx(3, abs=0.1)
    assert any("no timestamps" in w for w in video.warnings) == (suffix == "h264")


def test_size_scales_while_decoding(clip: Path) -> None:
    video = read_video(clip, frames=4, size=(24, 64))
    assert video.frames.shape == (4, 24, 64, 3)
    assert video.size == (48, 128)


def test_picture_size_changes_within_the_video(folder: Path) -> None:
    both = folder / "changing.h264"
    write(folder / "one.h264", 20)
    write(folder / "two.h264", 20, height=96, width=256)
    both.write_bytes((folder / "one.h264").read_bytes() + (folder / "two.h264").read_bytes())
    video = read_video(both, frames=8)
    assert video.frames.shape == (8, 48, 128, 3)
    assert any("size changes" in w for w in video.warnings)


def test_video_with_audio(folder: Path) -> None:
    check(read_video(write(folder / "both.mp4", 60, audio=True), frames=7))
