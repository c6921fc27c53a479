"""SceneTilling: every scene of the video gets as many tokens as the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokprune.budget import equal_spaced, whole_frames
from tokprune.methods.base import check_finite
from tokprune.methods.frames_base import FramesMethod
from tokprune.methods.options import option
from tokprune.ops.frames import by_segment, frame_means, frames_of_scenes, scenes
from tokprune.ops.numeric import wide
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens


@register_method(
    "scenetilling",
    paper="VideoLLaMB: Long Streaming Video Understanding with Recurrent Memory Bridges",
    year=2025,
    url="https://arxiv.org/abs/2409.01071",
    complexity="O(ND)",
    memory="O(ND)",
    video=True,
    checked=Checked(
        "bigai-nlco/VideoLLaMB",
        "similarities, depths and boundaries of VideoLLaMB's function on the golden vectors",
        "frames are compared by their mean token; budgets are ours",
    ),
)
@dataclass(frozen=True)
class SceneTilling(FramesMethod):
    """SceneTilling (VideoLLaMB, ICCV 2025): cut the video where frames change most; every scene gets as much as the
    next.

    A long static shot then costs no more than a short one. Between frames t and t + 1 the similarity dips by the sum of
    how far it lies below the peaks left and right of it; a scene ends where that exceeds its mean + `alpha` standard
    deviations, at the `most` deepest such places, or, with boundaries, at exactly so many (the trained model asks for
    3). Frames are compared by the mean of their tokens (the paper: by the tower's [CLS]).

    The paper only cuts; the budget is ours: equal per scene, what a short scene cannot take flows to the others, and
    within a scene spread="tokens": equal per frame; spread="frames": whole frames, evenly spaced, the last one in time
    cut to the exact sum. The published code fails when asked for more boundaries than there are (here: all of them),
    and takes rounding for scenes where a video stands still.
    """

    alpha: float = 0.5
    most: int = option(15, low=0)
    boundaries: int | None = option(None, low=0, example=3)
    spread: Literal["tokens", "frames"] = "tokens"

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each frame may keep. One host synchronisation."""
        features = wide(check_finite(tokens.features, "the visual features"))
        means = frame_means(features, tokens.layout.to(features.device))
        lengths = scenes(means, self.alpha, self.most, self.boundaries)
        sizes = tokens.layout.group_sizes
        if self.spread == "frames":
            return whole_frames(keep, lambda count: frames_of_scenes(lengths, count), sizes)
        parts = by_segment(sizes, lengths)
        shares = equal_spaced(keep, [sum(part) for part in parts])
        return [k for share, part in zip(shares, parts, strict=True) for k in equal_spaced(share, part)]
