"""WFS-SB: keyframes scene by scene, where the scenes are read off the relevance of the frames."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokprune.budget import whole_frames
from tokprune.methods.base import check_finite
from tokprune.methods.frames.questions import QuestionScored
from tokprune.methods.options import option
from tokprune.ops.frames import frame_means
from tokprune.ops.keyframes import WEIGHTS, best_first, wfs_sb
from tokprune.ops.numeric import finite, wide
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens


@register_method(
    "wfs_sb",
    paper="Wavelet-based Frame Selection by Detecting Semantic Boundary for Long Video Understanding",
    year=2026,
    url="https://arxiv.org/abs/2603.00512",
    complexity="O(ND + TMD)",
    memory="O(ND)",
    query_aware=True,
    video=True,
    checked=Checked(
        "MAC-AutoML/WFS-SB",
        "chosen frames, with and without features, videos of 2 to 400 frames and scores of four kinds",
        "constant or flat signals; frames are compared by their mean token instead of the scorer's features",
    ),
)
@dataclass(frozen=True)
class WfsSb(QuestionScored):
    """WFS-SB (CVPR 2026): whole frames, chosen scene by scene for relevance and for not resembling each other.

    The scores are a signal over time; where its coarsest wavelet band (db4) is strong, the relevance changes, and there
    a scene begins. Scenes get frames by their importance (duration, mean, best, variance of the scores), and in each
    scene frames are chosen one by one, relevant and unlike the ones before. As few frames as hold the budget; the least
    relevant of these gets what is left of it. Frames are compared by the mean of their tokens (the paper: by the
    features of its scorer). In the paper frames are chosen before the encoder; `tokprune.video.select_frames` does
    that.

    Exact in the published code, too. Ours: constant scores give evenly spaced frames (there: the first ones), and a
    signal that is flat up to rounding has no scenes. No PyWavelets, no SciPy.

    weights: of duration, mean, best and variance in a scene's importance. strictness: scenes this many standard
    deviations below the mean get nothing, if there are more than three. balance: 0 is relevance alone, 1 diversity
    alone.
    """

    weights: tuple[float, float, float, float] = option(
        WEIGHTS, low=0, hint="They weigh duration, mean, best and variance."
    )
    strictness: float = 1.2
    balance: float = option(0.5, low=0, high=1, hint="0 is relevance alone, 1 diversity alone.")

    def allocate_by(self, worth: Tensor, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each frame may keep. The frames' means go to the host."""
        scores = finite(worth).double().tolist()
        features = wide(check_finite(tokens.features, "the visual features"))
        means = frame_means(features, tokens.layout.to(features.device)).double().cpu().numpy()

        def choose(count: int) -> list[int]:
            return best_first(wfs_sb(scores, count, means, self.weights, self.strictness, self.balance), scores)

        return whole_frames(keep, choose, tokens.layout.group_sizes)
