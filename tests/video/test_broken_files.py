"""What comes out of broken files, and clear words about each; decord is kept on a leash."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.video.backends import check
from tests.video.clips import av, numbers, sound, write
from tokprune.errors import OptionError
from tokprune.video import VideoError, backend_pyav, read_video

# --- broken, empty and foreign files


def test_truncated_file_gives_its_head(clip: Path, folder: Path) -> None:
    fast = write(folder / "fast.mp4", 240, container={"movflags": "faststart"})
    short = folder / "truncated.mp4"
    short.write_bytes(fast.read_bytes()[: int(fast.stat().st_size * 0.6)])
    video = read_video(short, frames=16)
    check(video)
    assert len(video) == 16
    assert 60 < video.total < 240
    assert any("cut off: it announces 240" in w for w in video.warnings)
    index_at_end = folder / "headless.mp4"
    index_at_end.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * 0.6)])
    with pytest.raises(VideoError, match="not a video that FFmpeg can read"):
        read_video(index_at_end, frames=4)


def test_truncated_mkv(folder: Path) -> None:
    whole = write(folder / "whole.mkv", 240)
    short = folder / "truncated.mkv"
    short.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.5)])
    video = read_video(short, frames=16)
    check(video)
    assert 60 < video.total < 240
    assert any("cut off" in w for w in video.warnings)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("filler", ["zeros", "noise"])
def test_garbage_in_the_middle(folder: Path, suffix: str, filler: str) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    whole = write(folder / f"healthy.{suffix}", 240, container=options)
    data = bytearray(whole.read_bytes())
    low, high = int(len(data) * 0.5), int(len(data) * 0.75)
    noise = np.random.default_rng(0).integers(0, 256, high - low, np.uint8).tobytes()
    data[low:high] = bytes(high - low) if filler == "zeros" else noise
    path = folder / f"{filler}.{suffix}"
    path.write_bytes(data)
    start = time.monotonic()
    video = read_video(path, frames=240)
    assert time.monotonic() - start < 30
    assert video.warnings, "damage must be told"
    healthy = video.indices[video.indices < 80]
    assert len(healthy) >= 78
    assert numbers(video.frames[: len(healthy)]) == healthy.tolist()
    assert len(video) == len(video.indices) == len(np.unique(video.indices))


def test_zeroed_tail_and_on_missing(folder: Path) -> None:
    whole = write(folder / "tail.mp4", 240, container={"movflags": "faststart"})
    data = bytearray(whole.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path = folder / "zero tail.mp4"
    path.write_bytes(data)
    dropped = read_video(path, frames=24)
    check_until = dropped.indices < 90
    assert numbers(dropped.frames[check_until]) == dropped.indices[check_until].tolist()
    assert dropped.missing
    assert len(dropped) + len(dropped.missing) == 24
    assert any("cannot be decoded" in w and "left out" in w for w in dropped.warnings)
    near = read_video(path, frames=24, on_missing="nearest")
    assert len(near) == 24
    assert set(near.indices) == set(dropped.indices)
    assert near.missing == dropped.missing
    with pytest.raises(VideoError, match="chosen frames cannot be decoded"):
        read_video(path, frames=24, on_missing="raise")


def test_zeroed_file(folder: Path) -> None:
    whole = write(folder / "zeroable.mp4", 48, container={"movflags": "faststart"})
    data = bytearray(whole.read_bytes())
    at = data.index(b"mdat") + 4
    data[at:] = bytes(len(data) - at)
    path = folder / "zeroed.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="can be decoded"):
        read_video(path, frames=4)


def test_audio_only(folder: Path) -> None:
    path = folder / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        sound(out, out.add_stream("aac", rate=16000))
    with pytest.raises(VideoError, match=r"no video stream\. Streams in it: audio"):
        read_video(path, frames=4)


def test_not_a_video(folder: Path) -> None:
    text = folder / "notes.txt"
    text.write_text("no video\n" * 100)
    empty = folder / "empty.mp4"
    empty.write_bytes(b"")
    playlist = folder / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    for path in (text, empty, playlist):
        start = time.monotonic()
        with pytest.raises(VideoError):
            read_video(path, frames=4)
        assert time.monotonic() - start < 5


def test_no_frames_at_all(folder: Path, clip: Path) -> None:
    path = folder / "framefree.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 128, "yuv420p"
        out.start_encoding()
    with pytest.raises(VideoError):
        read_video(path, frames=4)
    for bad in (0, -3, True, 2.5, "8", [], [1, "2"]):
        with pytest.raises(OptionError, match="frames="):
            read_video(clip, frames=bad)  # type: ignore[arg-type]


def test_where_the_path_leads_nowhere(folder: Path, clip: Path) -> None:
    with pytest.raises(OptionError, match=r"URL.*Download it first"):
        read_video("https://example.org/a.mp4", frames=4)
    with pytest.raises(OptionError, match=r"URL; give the path itself: '/a\.mp4'"):
        read_video("file:///a.mp4", frames=4)
    with pytest.raises(OptionError, match=r"there is no file .* Did you mean 'clip\.mp4'"):
        read_video(str(folder / "clop.mp4"), frames=4)
    with pytest.raises(OptionError, match="path is a int"):
        read_video(3, frames=4)  # type: ignore[arg-type]
    pipe = folder / "pipe.mp4"
    os.mkfifo(pipe)
    with pytest.raises(OptionError, match="neither a file nor a folder"):
        read_video(pipe, frames=4)


def test_odd_names(clip: Path, folder: Path) -> None:
    for name in ("a:b.mp4", "concat:x|y.mp4", "ünï 100%d.mp4", "-dash"):
        copy = folder / name
        copy.write_bytes(clip.read_bytes())
        check(read_video(copy, frames=3))


# --- time and memory


def test_time_limit(clip: Path) -> None:
    with pytest.raises(VideoError, match="time_limit"):
        read_video(clip, frames=8, backend="pyav", time_limit=1e-9)


def test_a_hanging_decord_is_ended(clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that spins as decord's native code does, in the child process only."""
    fake = folder / "fake"
    fake.mkdir()
    (fake / "decord.py").write_text(
        "class VideoReader:\n    def __init__(self, *a, **k):\n        print('noise on stdout')\n        while True: "
        "pass\n"
    )
    monkeypatch.syspath_prepend(str(fake))
    start = time.monotonic()
    with pytest.raises(VideoError, match="known to hang"):
        read_video(clip, frames=4, backend="decord", time_limit=1.5)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("body", ["raise RuntimeError('boom')", "import os; os._exit(3)", "import os; os.abort()"])
def test_a_crashing_decord_is_told(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "decord.py").write_text(f"class VideoReader:\n    def __init__(self, *a, **k):\n        {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(VideoError, match="decord failed"):
        read_video(clip, frames=4, backend="decord")


def test_decord_with_another_count_is_refused(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "decord.py").write_text(
        "class VideoReader:\n    def __init__(self, *a, **k): pass\n    def __len__(self): return 250\n"
        "    def get_frame_timestamp(self, i): return (0.0, 0.0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(VideoError, match="counts 250 frames"):
        read_video(clip, frames=4, backend="decord")


def test_a_seek_that_misleads_is_noticed(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where seeking does not lead to the key frame, the file is read from its start instead."""
    monkeypatch.setattr(backend_pyav, "sought", lambda *a: None)
    check(read_video(clip, frames=[3, 100, 217]))
