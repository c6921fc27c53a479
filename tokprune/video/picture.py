"""Turning and scaling of single frames, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Orientation:
    """How stored pixels become upright ones: first swap rows and columns, then mirror left-right, then upside-down."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    @staticmethod
    def of(frame: Any) -> Orientation:
        """The display matrix of a PyAV frame, to the nearest quarter turn.

        The matrix (a b u; c d v; x y w) sends a pixel (x, y) to (a·x + c·y, b·x + d·y), y pointing down.
        """
        for data in frame.side_data:
            if data.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
                if abs(b) + abs(c) > abs(a) + abs(d):
                    return Orientation(True, c < 0, b < 0)
                return Orientation(False, a < 0, d < 0)
        return UPRIGHT

    @property
    def mirrored(self) -> bool:
        """Whether it is a reflection, which no rotation makes good: decord and torchcodec turn such frames wrongly."""
        return self.transpose ^ self.mirror ^ self.flip

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after turning."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, frame: Frame) -> Frame:
        """(H, W, 3) as stored -> upright; a view."""
        frame = frame.swapaxes(0, 1) if self.transpose else frame
        frame = frame[:, ::-1] if self.mirror else frame
        return frame[::-1] if self.flip else frame


UPRIGHT = Orientation()


def fit(frame: Frame, size: tuple[int, int]) -> Frame:
    """Scale a frame to (height, width), bicubic with antialiasing; unchanged when it has that size."""
    if frame.shape[:2] == size:
        return frame
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
