"""Pictures and clips as processors take them: plain arrays and a metadata record, never a path and never a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tokprune.errors import OptionError
from tokprune.files import rgb
from tokprune.types import JsonObject
from tokprune.video.result import Video

if TYPE_CHECKING:
    from PIL.Image import Image

TICKS = 1000
"""Frame numbers a second of the metadata: a clock fine enough for true timestamps of any frame rate."""

ARRAY_FPS = 2.0
"""Frames a second of an array that comes without timestamps: the rate at which Qwen-VL samples."""


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of one video as the model will see them. frames: (T, H, W, 3) uint8. seconds: (T,) ascending."""

    frames: npt.NDArray[np.uint8]
    seconds: npt.NDArray[np.float64]
    duration: float

    def __len__(self) -> int:
        return len(self.frames)

    def metadata(self) -> JsonObject:
        """The fields of a Transformers `VideoMetadata` whose timestamps and sampled rate are true for these frames.

        Processors divide frame numbers by a constant rate and take the sampled rate to be that of the whole file;
        neither holds for variable rates, for a part of a file, or for frames that were chosen by hand. So frames are
        numbered on a clock of their own, and the total is as long as these frames reach.
        """
        count = len(self)
        step = (self.seconds[-1] - self.seconds[0]) / (count - 1) if count > 1 else 1 / ARRAY_FPS
        height, width = self.frames.shape[1:3]
        return {
            "total_num_frames": max(round(count * max(step, 1 / TICKS) * TICKS), 1),
            "fps": float(TICKS),
            "width": width,
            "height": height,
            "duration": self.duration,
            "video_backend": "pyav",  # Transformers knows a fixed list of names; nothing is decoded
            "frames_indices": [round(s * TICKS) for s in self.seconds.tolist()],
        }


def as_clip(video: object) -> Clip:
    """A clip of a tokprune.video.Video, of frames (T, H, W, 3) uint8, or of the pair (frames, seconds).

    Frames may be an array, a tensor, or a list of PIL pictures or (H, W, 3) arrays of one size. Without times they are
    taken to be half a second apart.
    """
    if isinstance(video, Clip):
        return video
    if isinstance(video, Video):
        if not len(video):
            raise OptionError(f"{video.path} gave no frames; ask for others, or for a longer part of it.")
        return Clip(video.frames, np.asarray(video.timestamps, np.float64), video.duration)
    if isinstance(video, str | Path):
        raise OptionError(
            f"{str(video)!r} is a path; read the video first: tokprune.video.read_video({str(video)!r}, frames=16)."
        )
    source, seconds = video if isinstance(video, tuple) and len(video) == 2 and _times(video[1]) else (video, None)
    frames = _frames(source)
    if seconds is None:
        times = np.arange(len(frames)) / ARRAY_FPS
    else:
        times = np.asarray(seconds, np.float64)
        if times.shape != (len(frames),) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise OptionError(
                f"timestamps of shape {times.shape} for {len(frames)} frames; give one per frame, in seconds, "
                "ascending."
            )
    gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / ARRAY_FPS
    return Clip(frames, times, float(times[-1] + gap))


def _times(value: object) -> bool:
    """Whether the second of a pair is a list of seconds, not a frame."""
    return value is None or np.ndim(value) == 1  # type: ignore[arg-type]


def _frames(video: object) -> npt.NDArray[np.uint8]:
    if hasattr(video, "detach"):  # a tensor
        video = video.detach().cpu().numpy()
    try:
        frames = np.asarray(video) if isinstance(video, np.ndarray) else np.stack([np.asarray(f) for f in video])  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        what = type(video).__name__
        raise OptionError(f"a video is (T, H, W, 3) uint8 frames of one size, not this {what}: {error}") from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise OptionError(
            f"a video is (T, H, W, 3) uint8 frames with T >= 1; given {frames.dtype} of shape {frames.shape}."
        )
    return frames


def as_picture(image: object) -> Image:
    """A PIL picture in RGB, of a PIL picture or an (H, W, 3) uint8 array."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return rgb(image, on_white=False)
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 3 and image.dtype == np.uint8:
        return Image.fromarray(image)
    shape = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else repr(image)[:80]
    raise OptionError(f"an image is a PIL picture or an (H, W, 3) uint8 array; given {shape}.")


def stamp(seconds: float) -> str:
    """Seconds as mm:ss."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def check_lengths(clips: Sequence[Clip], who: str) -> None:
    """Refuse clips of different lengths where the model stacks them."""
    lengths = [len(c) for c in clips]
    if len(set(lengths)) > 1:
        raise OptionError(
            f"{who} takes clips of equally many frames in one call; given {lengths}. Read each with the same frames=."
        )
