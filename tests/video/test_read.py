"""Exact frames out of every kind of file, and clear words about every broken one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.video.clips import av, cut, drawn, number, numbers, sound, turned, write
from tokprune.errors import MissingExtraError, OptionError
from tokprune.video import Video, VideoError, backend_decord, backend_pyav, read_video, scan
from tokprune.video.index import PacketIndex


def usable(name: str) -> str:
    """Why a backend cannot run here, or an empty string."""
    if name == "pyav":
        return ""
    try:
        if name == "decord":
            import decord  # noqa: F401
        else:
            from torchcodec.decoders import VideoDecoder

            VideoDecoder(b"")
    except ImportError as error:
        return f"{name} is not installed: {error}"
    except Exception as error:
        if "libtorchcodec" in str(error):
            return "torchcodec finds no FFmpeg libraries on this machine"
    return ""


def backends() -> list[object]:
    out = []
    for name in ("pyav", "decord", "torchcodec"):
        why = usable(name)
        out.append(pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=why)))
    return out


BACKENDS = backends()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """240 frames, 8 s, key frames every 24, B-frames."""
    return write(folder / "clip.mp4", 240)


def check(video: Video) -> None:
    """Each frame is the one that its index names."""
    assert numbers(video.frames) == video.indices.tolist()
    assert video.frames.dtype == np.uint8
    assert len(video.timestamps) == len(video.frames) == len(video)


def test_import_is_light() -> None:
    code = (
        "import sys, tokprune.video\n"
        "heavy = {'av', 'decord', 'torch', 'torchcodec', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frames", [1, 3, 16, 64])
def test_exact_on_constant_rate(clip: Path, backend: str, frames: int) -> None:
    video = read_video(clip, frames=frames, backend=backend)
    check(video)
    assert video.indices.tolist() == np.linspace(0, 239, frames).astype(int).tolist()
    assert video.total == 240
    assert video.size == (48, 128)
    assert video.fps == pytest.approx(30)
    assert video.duration == pytest.approx(8)
    assert video.timestamps == pytest.approx(video.indices / 30)
    assert video.backend == backend
    assert video.warnings == ()
    assert video.rule == "linspace_unique"


def test_auto_says_why(clip: Path) -> None:
    video = read_video(clip, frames=2)
    assert video.backend == "pyav"
    assert video.reason.startswith("auto: ")
    assert "2 of 240 frames" in repr(video)
    assert video.metadata()["frames_indices"] == [0, 239]


def test_every_single_frame_by_itself(clip: Path) -> None:
    index = scan(clip)
    for i in [*range(0, 240, 19), 22, 23, 24, 25, 238, 239]:
        video = read_video(clip, frames=[i], index=index)
        assert numbers(video.frames) == [i]


def test_indices_in_any_order_and_repeated(clip: Path) -> None:
    video = read_video(clip, frames=[200, 3, 3, 77, 200])
    check(video)
    assert video.indices.tolist() == [200, 3, 3, 77, 200]
    assert video.rule == "indices"


def test_start_end_and_fps(clip: Path) -> None:
    video = read_video(clip, fps=2, start=1.0, end=3.0)
    check(video)
    assert video.indices.tolist() == [30, 45, 60, 75]
    assert video.rule == "fps=2"
    assert read_video(clip, frames=3, start=1.01, end=2.0).indices.tolist() == [30, 44, 59]
    assert read_video(clip, start=0.1, end=0.2).indices.tolist() == [3, 4, 5]
    assert read_video(clip, start=0.11, end=0.12).indices.tolist() == [3]
    assert read_video(clip, start=7.99).indices.tolist() == [239]
    both = read_video(clip, fps=10, frames=5)
    assert both.indices.tolist() == np.linspace(0, 239, 5).astype(int).tolist()
    assert read_video(clip, fps=0.5, frames=5).rule == "fps=0.5"
    late = read_video(clip, frames=2, end=100)
    assert "lies behind the end" in late.warnings[0]
    fast = read_video(clip, fps=300, end=0.2)
    assert fast.indices.tolist() == list(range(6))
    assert "above the video's own" in fast.warnings[0]


def test_more_frames_than_there_are(folder: Path) -> None:
    video = read_video(write(folder / "short.mp4", 5), frames=64)
    check(video)
    assert len(video) == 5
    assert "64 frames were asked for and there are 5" in video.warnings[0]
    repeated = read_video(folder / "short.mp4", frames=10, rule="linspace")
    check(repeated)
    assert len(repeated) == 10


@pytest.mark.parametrize("rule", ["linspace", "linspace_rounded", "centers", "floor"])
def test_rules_by_name(clip: Path, rule: str) -> None:
    video = read_video(clip, frames=4, rule=rule)
    check(video)
    assert video.rule == rule
    if rule == "floor":
        assert video.indices.tolist() == [0, 60, 120, 180]


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


@pytest.fixture(scope="module")
def edited(clip: Path, folder: Path) -> Path:
    """The clip without its first 34 frames, which stay in the file."""
    return cut(clip, folder / "edited.mp4", 34)


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


def test_video_with_audio(folder: Path) -> None:
    check(read_video(write(folder / "both.mp4", 60, audio=True), frames=7))


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


def test_options_that_mean_nothing(clip: Path) -> None:
    wrong = [
        ({"fps": 0}, "frames per second"),
        ({"start": -1.0}, "start="),
        ({"start": 2.0, "end": 1.0}, "greater than start"),
        ({"start": 9.0}, "lasts 8.00 s"),
        ({"frames": [240]}, "frames 0 to 239"),
        ({"frames": [1], "fps": 2}, "names the frames already"),
        ({"backend": "pyaf"}, "Did you mean 'pyav'"),
        ({"rule": "linspase"}, "Did you mean 'linspace'"),
        ({"on_missing": "skip"}, "unknown on_missing"),
        ({"size": (0, 4)}, "height, width"),
        ({"size": 384}, "height, width"),
        ({"time_limit": 0}, "time_limit"),
        ({"size": (60000, 60000)}, "GiB"),
    ]
    for options, message in wrong:
        with pytest.raises(OptionError, match=message):
            read_video(clip, **options)  # type: ignore[arg-type]


def test_an_index_serves_its_own_file_only(clip: Path, edited: Path) -> None:
    with pytest.raises(OptionError, match="index= belongs to"):
        read_video(edited, frames=2, index=scan(clip))


@pytest.mark.parametrize("package", ["av", "decord", "torchcodec"])
def test_missing_package(clip: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    index = scan(clip)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "torchcodec":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    if package == "decord":
        monkeypatch.setattr(backend_decord.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pip install 'tokprune\[video\]'"):
        read_video(clip, frames=2, backend="pyav" if package == "av" else package, index=index)


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


def test_memory_of_a_long_file(folder: Path) -> None:
    """An hour at 1 fps: 3600 frames, of which 8 are kept, must not be held all at once."""
    path = write(folder / "hour.mp4", 3600, rate=1, gop=250, height=32, options={"preset": "ultrafast"})
    tracemalloc.start()
    video = read_video(path, frames=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    check(video)
    assert video.total == 3600
    assert video.duration == pytest.approx(3600)
    all_frames = 3600 * 32 * 128 * 3
    assert peak < all_frames / 20


def test_few_frames_are_decoded_and_converted(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame near a key frame costs a few packets, and only chosen frames become RGB."""
    made: list[int] = []
    real = backend_pyav.picture

    def counted(frame: object, i: int, job: object) -> np.ndarray:
        made.append(i)
        return real(frame, i, job)

    monkeypatch.setattr(backend_pyav, "picture", counted)
    read_video(clip, frames=[3, 150, 217])
    assert sorted(made) == [3, 150, 217]


def test_plan_joins_near_stretches(clip: Path) -> None:
    index = scan(clip)
    assert isinstance(index, PacketIndex)
    assert backend_pyav.plan(index, [0, 23, 25, 100]) == [(0, [0, 23, 25]), (4, [100])]


def test_a_seek_that_misleads_is_noticed(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where seeking does not lead to the key frame, the file is read from its start instead."""
    monkeypatch.setattr(backend_pyav, "sought", lambda *a: None)
    check(read_video(clip, frames=[3, 100, 217]))


def test_number_reads_what_drawn_draws() -> None:
    assert [number(drawn(i)) for i in (0, 1, 1799, 65535)] == [0, 1, 1799, 65535]
