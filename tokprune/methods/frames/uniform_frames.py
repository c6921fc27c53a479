"""Uniform frames: evenly spaced frames, or all frames alike; the baseline that knows nothing of the video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokprune.budget import equal_spaced, whole_frames
from tokprune.methods.frames_base import FramesMethod
from tokprune.methods.options import option
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens
from tokprune.video.sampling import RULES
from tokprune.video.select import even_frames


@register_method("uniform_frames", paper="baseline: evenly spaced frames", complexity="O(T)", memory="O(T)", video=True)
@dataclass(frozen=True)
class UniformFrames(FramesMethod):
    """Evenly spaced frames. Every study of frame selection compares with it, and on many questions it is hard to beat.

    spread="frames": as few whole frames as hold the budget, evenly spaced by `rule` ("middles" of equal segments, or a
    name in `tokprune.video.sampling`: they differ by half a segment and in whether the last frame is seen); the last
    one in time gets what is left. spread="tokens": all frames, as equal shares as their sizes allow; with fewer tokens
    than frames the frames that keep one are evenly spaced.
    """

    spread: Literal["frames", "tokens"] = "frames"
    rule: str = option("middles", choices=("middles", *RULES))

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        sizes = tokens.layout.group_sizes
        if self.spread == "tokens":
            return equal_spaced(keep, sizes)
        return whole_frames(keep, lambda count: even_frames(len(sizes), count, self.rule), sizes)
