"""The backends that can run here, and what every one of them must give."""

from __future__ import annotations

import numpy as np
import pytest

from tests.video.clips import numbers
from tokprune.video import Video


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


def check(video: Video) -> None:
    """Each frame is the one that its index names."""
    assert numbers(video.frames) == video.indices.tolist()
    assert video.frames.dtype == np.uint8
    assert len(video.timestamps) == len(video.frames) == len(video)
