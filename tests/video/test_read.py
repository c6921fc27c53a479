"""Exact frames by number, time and rule, and clear words about options that mean nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.video.backends import BACKENDS, check
from tests.video.clips import drawn, number, numbers, write
from tokprune.errors import MissingExtraError, OptionError, install_line
from tokprune.video import backend_decord, backend_pyav, read_video, scan
from tokprune.video.index import PacketIndex


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
    with pytest.raises(MissingExtraError, match=package + ".*" + re.escape(install_line("video"))):
        read_video(clip, frames=2, backend="pyav" if package == "av" else package, index=index)


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


def test_number_reads_what_drawn_draws() -> None:
    assert [number(drawn(i)) for i in (0, 1, 1799, 65535)] == [0, 1, 1799, 65535]
