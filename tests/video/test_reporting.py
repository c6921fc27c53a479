"""Reading ends when FFmpeg reports to Python, as it does once an older torchvision is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.video.clips import write

READ = """
import sys
import av.logging
from tokprune.video import read_video
av.logging.set_level(av.logging.ERROR)
for _ in range(8):
    for path in sys.argv[1:]:
        for frames in (5, [70], [89, 30]):
            read_video(path, frames=frames)
"""


def test_decoders_that_report_are_freed(folder: Path) -> None:
    """A decoder's thread that reports waits for Python's lock, and freeing the decoder for that thread: a hang."""
    gradual = {"x264-params": "intra-refresh=1"}
    paths = [write(folder / "report.h264", 90), write(folder / "report.mov", 90, options=gradual)]
    command = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Missing reference picture" in done.stderr, "nothing was reported, so nothing was shown"
