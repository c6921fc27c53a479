"""torchcodec, in its exact mode only; every frame's time is checked against the packet index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tokprune.errors import missing_extra
from tokprune.video.index import PacketIndex
from tokprune.video.job import Job, VideoError
from tokprune.video.picture import Frame

BATCH = 8  # frames decoded per call: bounds what is held besides the result


def decode(index: PacketIndex, wanted: Sequence[int], job: Job) -> Iterator[tuple[int, Frame]]:
    """Decode the frames `wanted` (ascending, unique display indices); yields (index, upright RGB frame)."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError as error:
        raise missing_extra("torchcodec", "video", "backend='torchcodec'") from error
    except (RuntimeError, OSError) as error:
        raise unusable(error) from error
    if index.orientation.mirrored:
        raise VideoError(f"{index.path} is to be shown mirrored, which torchcodec gets wrong; use backend='pyav'.")
    if index.ordinal:
        raise VideoError(f"{index.path} carries no timestamps, which torchcodec needs; use backend='pyav'.")
    try:
        decoder = VideoDecoder(
            str(index.path), seek_mode="exact", dimension_order="NHWC", num_ffmpeg_threads=0, stream_index=index.stream
        )
        total = len(decoder)
    except Exception as error:  # torchcodec raises whatever its operators raise
        raise (unusable(error) if "libtorchcodec" in str(error) else failed(index, error)) from error
    if total != index.total:
        raise VideoError(
            f"torchcodec counts {total} frames in {index.path} where the packets show {index.total}; its indices would "
            "name other frames. Use backend='pyav'."
        )
    seconds = index.pts * float(index.time_base)
    for at in range(0, len(wanted), BATCH):
        job.check()
        part = list(wanted[at : at + BATCH])
        try:
            batches = [(part, decoder.get_frames_at(part))]
        except Exception:  # one bad frame fails the batch: take them singly
            batches = []
            for i in part:
                try:
                    batches.append(([i], decoder.get_frames_at([i])))
                except Exception as error:
                    job.notes.append(f"torchcodec cannot decode frame {i}: {first_line(error)}")
        for members, batch in batches:
            times = batch.pts_seconds.numpy()
            for i, time, frame in zip(members, times, batch.data.numpy(), strict=True):
                check_time("torchcodec", index, seconds, i, float(time))
                yield i, frame


def check_time(name: str, index: PacketIndex, seconds: np.ndarray, i: int, time: float) -> None:
    """Raise VideoError when a backend's frame `i` is shown at another frame's time."""
    nearest = int(np.abs(seconds - time).argmin())
    if nearest != i and abs(seconds[nearest] - seconds[i]) > 1e-4:
        raise VideoError(
            f"{name} returns frame {nearest} for frame {i} of {index.path} (shown at {time:.3f} s). Use backend='pyav'."
        )


def first_line(error: BaseException) -> str:
    """The message without its native stack trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def failed(index: PacketIndex, error: BaseException) -> VideoError:
    """The error for a file that torchcodec cannot open."""
    return VideoError(f"torchcodec cannot open {index.path}: {first_line(error)}. Use backend='pyav'.")


def unusable(error: BaseException) -> VideoError:
    """The error for an installation without FFmpeg's libraries."""
    return VideoError(
        "torchcodec is installed but cannot load FFmpeg's shared libraries (it brings none; versions 4 to 9 do): "
        f"{first_line(error)}. Install FFmpeg, or use backend='pyav', which brings its own."
    )
