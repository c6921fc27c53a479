"""Clips as mp4 files: H.264 through PyAV, one thread, so that the same machine writes the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokprune.errors import missing_extra

from .scenes import SIZE

if TYPE_CHECKING:
    from .clips import DemoClip

_OPTIONS = {"preset": "veryfast", "crf": "20", "threads": "1"}


def encode(frames: Iterable[NDArray[np.uint8]], file: str | IO[bytes], fps: int) -> None:
    """Write (H, W, 3) frames as H.264, yuv420p, in an mp4; file: a path or a binary file that can seek."""
    try:
        import av
    except ImportError as error:
        raise missing_extra("av", "video", "writing clips") from error
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_clip(clip: DemoClip, path: Path) -> Path:
    """The clip as an mp4 at `path`, unless it is already there; a kill leaves no half file."""
    from .clips import FPS

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        encode(clip.frames(), str(partial), FPS)
        os.replace(partial, path)
    return path
