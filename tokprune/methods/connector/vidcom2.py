"""VidCom2: frames that are unlike the video keep more, and in each frame the tokens that are unlike both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.options import Compat, option
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.ops.topk import rank_in_group, top_by_tier
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens


class Likeness(NamedTuple):
    """video, frame: (N,) likeness of each token to the centre of the video and of its frame; high = redundant."""

    video: Tensor
    frame: Tensor


def calm_channels(features: Tensor) -> Tensor:
    """The half of the channels that vary least over all tokens, ties to the lower one. features: (N, C) -> (C
    // 2,).
    """
    variance = wide(features).var(0, correction=0)
    return torch.sort(variance, stable=True).indices[: max(1, features.shape[-1] // 2)]


def vidcom2_likeness(features: Tensor, frame: Tensor, frames: int) -> Likeness:
    """Sum of five Gaussian kernels (widths 1/8 … 2) of the distance to a centre, in the calm channels (section 3.2).

    features: (N, C). frame: (N,) frame number of each token, 0 … frames-1. Centres are means of unit vectors, not
    normalised.
    """
    rows = unit(wide(features)[:, calm_channels(features)])
    count = rows.new_zeros(frames).index_add(0, frame, torch.ones_like(rows[:, 0])).clamp_min(1)
    means = rows.new_zeros(frames, rows.shape[1]).index_add(0, frame, rows) / count[:, None]

    def gaussian(centre: Tensor) -> Tensor:
        square = (rows - centre).square().sum(-1)
        return torch.stack([(-square / (2 * a)).exp() for a in (1 / 8, 1 / 4, 1 / 2, 1, 2)]).sum(0)

    return Likeness(gaussian(rows.mean(0)), gaussian(means[frame]))


def vidcom2_ratios(likeness: Tensor, frame: Tensor, frames: int, ratio: float, temperature: float = 0.01) -> Tensor:
    """Keep ratio of each frame: more than `ratio` for those unlike the video (section 3.3). likeness: (N,) ->
    (frames,).
    """
    count = likeness.new_zeros(frames).index_add(0, frame, torch.ones_like(likeness)).clamp_min(1)
    unlike = -(likeness.new_zeros(frames).index_add(0, frame, likeness) / count)
    share = ((unlike - unlike.max()) / temperature).softmax(0)
    return (ratio * (1 + share - share.mean())).clamp(max=1)


def vidcom2(
    features: Tensor, frame: Tensor, sizes: Tensor, ratio: float, temperature: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """What each frame keeps by the published rule, before any repair of the sum.

    features: (N, C). frame: (N,). sizes: (T,) tokens of each frame. Returns the counts (T,), the kept tokens as (N,)
    bool and each token's redundancy (N,).
    """
    video, own = vidcom2_likeness(features, frame, sizes.shape[0])
    redundancy = video + own
    wanted = vidcom2_ratios(video, frame, sizes.shape[0], ratio, temperature) * sizes
    counts = wanted.round().long().clamp(min=1).minimum(sizes)
    return counts, rank_in_group(-redundancy, frame) < counts[frame], redundancy


@register_method(
    "vidcom2",
    paper="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2505.14454",
    complexity="O(ND)",
    memory="O(ND)",
    checked=Checked(
        "xuyang-liu16/VidCom2",
        "scores, ratios, counts and kept tokens on the golden vectors, and vLLM's exact variant",
        "the default repairs the sum; float32 throughout",
    ),
)
@dataclass(frozen=True)
class VidCom2(ConnectorMethod):
    """VidCom2 (EMNLP 2025): budgets by how unlike the video a frame is, picks by how unlike video and frame a token is.

    Needs the features only, is query-free and linear. temperature: of the softmax over frames (0.01 as published, which
    makes it nearly one-hot: one frame keeps about twice the ratio, the others a little less than it).

    The published counts are rounded frame by frame and miss the budget (73 for 72). As in vLLM's variant the sum is
    repaired: surplus tokens go where redundancy is highest, missing ones come from where it is lowest, in the whole
    video; below one token per frame, frames vanish. compat="published" leaves the counts as they are. Everything is
    float32 (published: the model's dtype). Tiles count as frames; a picture is one frame.
    """

    temperature: float = option(0.01, above=0)
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        features = check_finite(wide(tokens.features), "the visual features")
        layout = tokens.layout
        frame = layout.group.to(features.device)
        sizes = torch.tensor(layout.group_sizes, device=features.device)
        counts, stays, redundancy = vidcom2(features, frame, sizes, keep / len(tokens), self.temperature)
        total = keep if self.compat == "corrected" else int(counts.sum())
        return Selection(top_by_tier(stays.long(), -redundancy, total), info={"scores": -redundancy})
