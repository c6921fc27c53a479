"""AKS: keyframes that are relevant and still cover the video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokprune.budget import whole_frames
from tokprune.errors import OptionError
from tokprune.methods.frames.questions import QuestionScored
from tokprune.methods.options import Compat, option
from tokprune.ops.keyframes import aks, aks_published, best_first
from tokprune.ops.numeric import finite
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens


@register_method(
    "aks",
    paper="Adaptive Keyframe Sampling for Long Video Understanding",
    year=2025,
    url="https://arxiv.org/abs/2502.21271",
    complexity="O(ND + T log T)",
    memory="O(ND)",
    query_aware=True,
    video=True,
    checked=Checked(
        "ncTimTang/AKS",
        "chosen frames with compat='published' on the golden vectors, empty choices included",
        "the default carries halves exactly and always chooses M frames",
    ),
)
@dataclass(frozen=True)
class AKS(QuestionScored):
    """AKS (CVPR 2025): whole frames that are relevant to the question, spread over the video where no part stands out.

    As few frames as hold the budget; the least relevant of these gets what is left of it. In the paper the frames are
    chosen at one a second before the encoder, by BLIP or CLIP scores (`tokprune.video.select_frames` does that); here
    among those encoded.

    What the published code does wrong, and what is done here:
    - each part contributes int(M / 2^depth) frames: none at all for M < 32 at the default depth, 32 of 48. Here halves
      of M are carried exactly, parts that could choose nothing are not made, and what short parts lack is topped up:
      always M frames.
    - a part is judged by the mean of its M best frames, so that parts with at most M frames never stand out. Here, as
      in the paper, by as many as it may choose.
    - constant scores divide by zero. Here they give evenly spaced frames.
    compat="published" restores it (a choice of no frame at all is refused with the reason).

    threshold: how far the best must be above the mean of a part (scores in 0 … 1). depth: how often the video is halved
    at most.
    """

    calibrate: Literal["auto", "minmax", "softmax", "sigmoid", "none"] = "none"
    threshold: float = 0.8
    depth: int = option(5, low=0, high=32, hint="It is how often a video is halved.")
    compat: Compat = "corrected"

    def allocate_by(self, worth: Tensor, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each frame may keep. One host synchronisation."""
        scores, sizes = finite(worth).double().tolist(), tokens.layout.group_sizes
        if self.compat == "corrected":
            return whole_frames(
                keep, lambda count: best_first(aks(scores, count, self.threshold, self.depth), scores), sizes
            )
        count = -(-keep // max(sizes))
        found = aks_published(scores, count, self.threshold, self.depth)
        if not found:
            raise OptionError(
                f"AKS's published code chooses no frame at all for {count} frames at depth={self.depth} (its "
                f"int({count} / 2^{self.depth}) is 0); lower depth, keep more, or use compat='corrected'."
            )
        out, left = [0] * len(sizes), keep
        for frame in best_first(found, scores):  # all tokens of these frames, up to the budget
            out[frame] = min(sizes[frame], left)
            left -= out[frame]
        return out
