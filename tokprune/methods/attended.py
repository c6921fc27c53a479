"""Features and [CLS] attention of a stream, checked, for methods that weigh tokens by the attention of the tower."""

from __future__ import annotations

from torch import Tensor

from tokprune.methods.base import check_finite, check_keep
from tokprune.ops.frames import frame_means, similar_runs
from tokprune.ops.numeric import wide
from tokprune.tokens import Layout, VisualTokens


def attended(tokens: VisualTokens, keep: int) -> tuple[Tensor, Tensor, Layout]:
    """Features (N, D) and attention (N,) in float32, checked to be finite, with the layout on their device.

    Raises BudgetError where `keep` does not fit the stream, OptionError on NaN or infinity.
    """
    check_keep(keep, len(tokens))
    features = check_finite(wide(tokens.features), "the visual features")
    attention = check_finite(wide(tokens.signal("cls_attention")), "the attention values").to(features.device)
    return features, attention, tokens.layout.to(features.device)


def scene_lengths(features: Tensor, layout: Layout, segments: int, below: float) -> list[int]:
    """Frames of each scene by DySeg: at least `segments` scenes, and a cut at every cosine `below`; one frame each
    without time.
    """
    if layout.kind != "video":
        return [1] * layout.num_groups
    return similar_runs(frame_means(features, layout), segments - 1, below)
