"""What `read_video` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokprune.types import JsonObject


@dataclass(frozen=True, eq=False)
class Video:
    """Some frames of a video, upright and in RGB, with where they come from.

    frames: (T, H, W, 3) uint8. timestamps: (T,) float64 seconds since the video's first frame. indices: (T,) int64
    numbers of these frames among the `total` displayed ones of the source (what edit lists hide is not counted).
    fps: mean rate of the source. duration: seconds, the last frame's included. size: (height, width) of the source,
    upright; the frames have it unless `size=` was asked. backend, reason: who decoded, and why it. rule: how the frames
    were chosen. missing: indices that were chosen and could not be decoded. warnings: what a user should know.
    """

    frames: npt.NDArray[np.uint8]
    timestamps: npt.NDArray[np.float64]
    indices: npt.NDArray[np.int64]
    total: int
    fps: float
    duration: float
    size: tuple[int, int]
    path: Path
    backend: str
    reason: str
    rule: str
    missing: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)

    def metadata(self) -> JsonObject:
        """The fields of a Transformers `VideoMetadata`: give them with the frames, and do_sample_frames=False.

        Processors turn indices into times with the constant `fps`; where the rate varies, `timestamps` has the true
        ones.
        """
        height, width = self.frames.shape[1:3]
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "width": width,
            "height": height,
            "duration": self.duration,
            "video_backend": self.backend,
            "frames_indices": self.indices.tolist(),
        }

    def __repr__(self) -> str:
        height, width = self.frames.shape[1:3]
        return (
            f"Video({len(self)} of {self.total} frames, {height}×{width}, {self.duration:.2f} s at {self.fps:.4g} fps, "
            f"backend={self.backend!r}, rule={self.rule!r}"
            + (f", {len(self.missing)} missing" if self.missing else "")
            + (f", {len(self.warnings)} warnings)" if self.warnings else ")")
        )
