"""Frames by time: as many a second as asked for, wherever they lie in the list."""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.budget import equal_spaced
from tokprune.methods.frames_base import FramesMethod
from tokprune.methods.options import option
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens
from tokprune.video.select import frames_by_time


@register_method("fps_frames", paper="baseline: frames at a rate in time", complexity="O(T)", memory="O(T)", video=True)
@dataclass(frozen=True)
class FpsFrames(FramesMethod):
    """Frames at `fps` a second, by their timestamps; they share the budget equally, as far as they can hold it.

    Right for variable frame rates and for frames that were sampled unevenly: it takes the frame on screen at each tick.
    What the frames cannot hold goes to those in between, as equally as they can take it, so the budget is met at every
    rate. Streams that do not know their timestamps count as one frame a second.
    """

    fps: float = option(1.0, above=0, hint="It is in frames per second.")

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        sizes = tokens.layout.group_sizes
        times = tokens.layout.timestamps or tuple(float(i) for i in range(len(sizes)))
        on = set(frames_by_time(times, self.fps))
        first = [n if i in on else 0 for i, n in enumerate(sizes)]
        out = equal_spaced(min(keep, sum(first)), first)
        if sum(out) < keep:
            rest = equal_spaced(keep - sum(out), [0 if i in on else n for i, n in enumerate(sizes)])
            out = [a + b for a, b in zip(out, rest, strict=True)]
        return out
