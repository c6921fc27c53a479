"""DyCoke's temporal token merging: one frame of four stays whole, of the others what has changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.budget import share
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, check_finite, check_keep
from tokprune.methods.connector.uniform import uniform
from tokprune.methods.options import Compat, option
from tokprune.ops.frames import earlier, similarity_to
from tokprune.ops.numeric import wide
from tokprune.ops.similarity import unit
from tokprune.ops.topk import grouped_top
from tokprune.registry import Checked, register_method
from tokprune.tokens import Selection, VisualTokens

GROUP = 4  # frames that share one whole frame (section 3.2 of the paper)


def reference_steps(frames: int, device: torch.device | str = "cpu") -> Tensor:
    """How many frames before each frame its reference lies: the first of four has none, the third looks at the first.

    Returns (frames,): 0, 1, 2, 1, 0, 1, 2, 1 …
    """
    return torch.tensor([0, 1, 2, 1], device=device).repeat(frames // GROUP + 1)[:frames]


def dycoke_published(features: Tensor, merging_ratio: float = 0.7) -> Tensor:
    """What the published code emits, in its order. features: (T, N, C) -> (K,) input positions.

    A frame that is thinned keeps int((1 - merging_ratio) N) tokens, the least similar first. An odd last frame is
    dropped, and the third frame of the last group of four stays whole. Four frames or fewer are an error there, and
    here.
    """
    frames, n, _ = features.shape
    if frames <= GROUP:
        raise OptionError(f"the published code needs more than {GROUP} frames, not {frames}; use compat='corrected'.")
    rows, place = unit(wide(features)), torch.arange(frames, device=features.device)
    cosine = (rows * rows[place - reference_steps(frames, rows.device)]).sum(-1)  # (T, N)
    least = cosine.sort(dim=-1, stable=True).indices[:, : int((1 - merging_ratio) * n)]
    out = []
    for t in range(frames - frames % 2):
        whole = t % GROUP == 0 or (t % GROUP == 2 and t - 2 >= frames - GROUP)
        out.append(t * n + (place.new_tensor(range(n)) if whole else least[t]))
    return torch.cat(out)


@register_method(
    "dycoke",
    paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
    year=2025,
    video=True,
    url="https://arxiv.org/abs/2411.15024",
    complexity="O(ND)",
    memory="O(ND)",
    checked=Checked(
        "KD-TAO/DyCoke",
        "kept tokens and their order with compat='published' on the golden vectors",
        "the default meets a budget, keeps an odd last frame and thins the third frame of the last group",
    ),
)
@dataclass(frozen=True)
class DyCoke(ConnectorMethod):
    """DyCoke (CVPR 2025), its first stage (TTM); pruning the KV cache while decoding is the second: `dycoke_cache`.

    Of four frames the first stays whole; the second and fourth keep what is least similar to the frame before, the
    third what is least similar to the first. As in the published code, what is left out is not averaged in, whatever
    the name says.

    merging_ratio: K of the paper, 0.7: a thinned frame keeps the share 1 - K of its tokens. Since the budget is given
    here, K only says how whole and thinned frames share it, 1 to 1 - K. At a ratio of (1 + 3 (1 - K)) / 4 = 0.475 that
    is the publication; below it the first frames cannot stay whole and keep an even grid of their tokens, above it the
    thinned ones get what is left.

    compat="published": counts and order of choice of the released code, whatever budget is asked for. It drops an odd
    last frame, leaves the third frame of the last four whole, may keep 0 tokens of a frame (truncation) and refuses
    four frames or fewer, as well as frames of different sizes. (It also emits tokens in the order of similarity; a
    stream stays in order here: see `dycoke_published`.)

    A picture, or a tile, is a first frame: an even grid of its tokens.
    """

    merging_ratio: float = option(0.7, low=0, below=1, hint="0.7 drops 70 % of a thinned frame.")
    compat: Compat = "corrected"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        features = check_finite(tokens.features.detach(), "the visual features")
        layout = tokens.layout.to(features.device)
        sizes, frames = layout.group_sizes, layout.num_groups
        if self.compat == "published":
            if layout.kind != "video" or len(set(sizes)) > 1:
                raise OptionError("compat='published' knows videos with frames of one size; use compat='corrected'.")
            return Selection(dycoke_published(features.unflatten(0, (frames, -1)), self.merging_ratio).sort().values)
        first = [layout.kind != "video" or t % GROUP == 0 for t in range(frames)]
        weights = [n * (1.0 if own else 1 - self.merging_ratio) for n, own in zip(sizes, first, strict=True)]
        budgets = share(keep, weights, sizes)
        grid = uniform(layout, [k if own else 0 for k, own in zip(budgets, first, strict=True)])
        back = reference_steps(frames, features.device)
        change = 1 - similarity_to(features, earlier(layout, back), -1.0)
        thinned = grouped_top(change, layout.group, [0 if own else k for k, own in zip(budgets, first, strict=True)])
        return Selection(torch.cat([grid, thinned]).sort().values, info={"scores": change})
