"""Numbers per frame: scores made comparable, and how close a frame is to words."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.errors import unknown
from tokprune.ops.distance import unit
from tokprune.ops.wide import wide
from tokprune.tokens import Layout

CALIBRATIONS = ("minmax", "softmax", "sigmoid", "none")


def finite(scores: Tensor) -> Tensor:
    """Scores in float32 (float64 stays); NaN and infinite ones become the worst there is, at most 0. (T,) -> (T,)."""
    scores = wide(scores)
    known = torch.isfinite(scores)
    worst = torch.where(known, scores, 0.0).amin().clamp(max=0.0)
    return torch.where(known, scores, worst)


def stretched(scores: Tensor) -> Tensor:
    """Scores stretched to 0 … 1; all 1 where they differ by no more than rounding does. (T,) -> (T,)."""
    low, high = scores.amin(), scores.amax()
    span = high - low
    flat = span <= 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(flat, 1.0, (scores - low) / torch.where(flat, 1.0, span))


def calibrated(scores: Tensor, how: str) -> Tensor:
    """Scores of a video's frames made comparable between videos and scorers.

    scores: (T,) raw; what is not finite counts as 0, at most as the lowest. how: "minmax" stretches them to 0 … 1.
    "softmax" is exp(score - best), for logits. "sigmoid" is an absolute probability, for logits with a bias such as
    SigLIP's; where all of them are below 0.001 they are stretched instead. "none" leaves them. Constant scores come out
    constant.
    """
    if how not in CALIBRATIONS:
        raise unknown("calibration", how, CALIBRATIONS)
    known = torch.isfinite(scores)
    scores = finite(scores)
    if how == "none":
        return scores
    if how == "softmax":
        return torch.where(known, (scores - torch.where(known, scores, -torch.inf).amax()).exp(), 0.0)
    low = torch.where(known, scores, torch.inf).amin()  # of the known ones: a missing score must not widen the range
    scores = torch.where(known, scores, torch.where(known.any(), low, 0.0))
    if how == "minmax":
        return stretched(scores)
    probability = scores.sigmoid()
    return torch.where((probability < 1e-3).all(), stretched(scores), probability)


def word_relevance(
    features: Tensor, layout: Layout, words: Tensor, best: int = 3, by_token: bool = False, block: int = 16384
) -> Tensor:
    """How close each frame is to a question's words, in the LLM's embedding space. Returns (T,), a mean cosine.

    features: (N, D). words: (J, D), centred. A frame is the mean of its tokens, each of unit length, less the mean over
    the video: what all frames share (also the offset between pictures and words) does not count. Its score is the mean
    over the `best` closest words. by_token: the closest token stands for the frame instead of the mean. O(N D), O(N J
    D) by token; blocks of tokens, so that no copy of a long video is made.
    """
    frames = layout.num_groups
    rows = [slice(i, i + block) for i in range(0, features.shape[0], block)]
    total = wide(features[:0]).new_zeros(frames, features.shape[1])
    for part in rows:
        total = total.index_add(0, layout.group[part], unit(wide(features[part])))
    sizes = torch.tensor(layout.group_sizes, device=total.device).clamp(min=1)[:, None]
    means = total / sizes
    centre = means.mean(0)
    words = unit(words.to(total))
    if by_token:
        cosine = total.new_full((frames, len(words)), -torch.inf)
        for part in rows:
            near = unit(_apart(unit(wide(features[part])), centre)) @ words.T
            cosine = cosine.scatter_reduce(0, layout.group[part][:, None].expand_as(near), near, "amax")
    else:
        cosine = unit(_apart(means, centre)) @ words.T  # (T, J)
    return cosine.topk(min(best, len(words)), dim=-1).values.mean(-1)


def _apart(rows: Tensor, centre: Tensor) -> Tensor:
    """Rows less the centre; 0 where only rounding is left, whose direction would mean nothing."""
    off = rows - centre
    return torch.where(off.norm(dim=-1, keepdim=True) > 1e-5 * rows.norm(dim=-1, keepdim=True), off, 0.0)
