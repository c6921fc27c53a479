"""QuoTA: each frame gets tokens by how much it has to do with the question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

import numpy as np
from torch import Tensor

from tokprune.budget import weighted_shares
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.frames.questions import QuestionScored
from tokprune.methods.frames.reduce import RECTANGULAR, FrameReducer, rectangles
from tokprune.methods.options import Compat, option
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens


def quota_shares(
    scores: Sequence[float], keep: int, capacities: Sequence[int], power: float = 2.0, minimum: int = 0
) -> list[int]:
    """QuoTA's assignment with an exact sum: shares in proportion to score^power, none above what a frame has.

    scores: (T,), higher is better; what is NaN, infinite or negative counts as 0, all 0 as equal. keep: at most the sum
    of the capacities. minimum: tokens that every frame keeps if the budget reaches. Returns T numbers whose sum is
    `keep`.
    """
    weights = [s if math.isfinite(s) and s > 0 else 0.0 for s in scores]
    peak = max(weights, default=0.0) or 1.0  # huge scores must not overflow
    return weighted_shares(keep, [(w / peak) ** power for w in weights], capacities, minimum)


def scale_weights(weights: Sequence[float], cap: float) -> list[float]:
    """Shares of 1 cut at `cap`, in one pass: each share below the cap grows in proportion to itself by what was cut off
    so far.

    Published: what a share exceeds the cap by after that joins what is shared out to those behind it, and the sum is
    not one any more.
    """
    out = [min(w, cap) for w in weights]
    excess = float(sum(max(w - cap, 0.0) for w in weights))
    if excess > 0:
        whole = np.sum(out)
        for i, w in enumerate(out):
            if w < cap:
                w += w / whole * excess
                excess += max(w - cap, 0.0)
                out[i] = min(w, cap)
    return out


def published_shares(weights: Sequence[float], keep: int, capacity: int | None = None) -> list[int]:
    """The published assignment: int(keep * share), which adds up to less than `keep`.

    weights: (T,) of scores already raised to their power. capacity: tokens of a frame; with it no share exceeds
    capacity / keep (variants 2 to 5 of the code). The code raises for weights that are all 0 or hold NaN; so does this.
    """
    total = float(np.sum(np.asarray(weights, dtype=np.float64)))  # the order of summation is NumPy's there, too
    if not math.isfinite(total) or total <= 0:
        raise OptionError(
            f"QuoTA's published code divides by the sum of the weights, which is {total}; use compat='corrected'."
        )
    shares = [w / total for w in weights]
    if capacity is not None:
        shares = scale_weights(shares, capacity / keep)
    return [int(keep * s) for s in shares]


def published_shape(count: int) -> tuple[int, int]:
    """Height and width of a resized frame of `count` tokens in the published code: (a + 1, a) or (a, a)."""
    side = math.isqrt(count)
    return (side + 1, side) if side * (side + 1) <= count else (side, side)


def rectangular_shares(shares: Sequence[int], grids: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Shares turned into numbers of tokens that form rectangles, and how many tokens are left over.

    Each frame starts with the largest rectangle that its share holds. Then the frame that lacks most gets the next
    larger one, as long as the step fits into what is left (ties: the smaller step, then the earlier frame).
    """
    sizes = [[h * w for h, w in rectangles(*grid)] for grid in grids]
    level = [sum(1 for s in options if s <= share) for options, share in zip(sizes, shares, strict=True)]

    def held(i: int) -> int:
        return sizes[i][level[i] - 1] if level[i] else 0

    area = [held(i) for i in range(len(shares))]
    left = sum(shares) - sum(area)

    def step(i: int) -> int:
        return sizes[i][level[i]] - area[i]

    waiting = [
        (area[i] - share, step(i), i) for i, share in enumerate(shares) if share > 0 and level[i] < len(sizes[i])
    ]
    heapify(waiting)
    while left and waiting:
        _, more, i = heappop(waiting)
        if more > left:  # it never will fit: what is left only shrinks
            continue
        level[i], area[i], left = level[i] + 1, area[i] + more, left - more
        if level[i] < len(sizes[i]):
            heappush(waiting, (area[i] - shares[i], step(i), i))
    return area, left


def fit_rectangles(
    shares: Sequence[int], grids: Sequence[tuple[int, int]], capacities: Sequence[int], minimum: int = 0
) -> list[int]:
    """Shares turned into rectangles where they can be; what is left over goes to the frames that lack most.

    capacities: tokens of each frame. The sum stays. A frame keeps its share as it is if it has holes, if its grid is so
    long that a single token is not of its form, or if the largest rectangle within its share is below `minimum`.
    """

    def can(share: int, grid: tuple[int, int], tokens: int) -> bool:
        if grid[0] * grid[1] != tokens or rectangles(*grid)[0] != (1, 1):
            return False
        return max((h * w for h, w in rectangles(*grid) if h * w <= share), default=0) >= min(minimum, share)

    able = [i for i, facts in enumerate(zip(shares, grids, capacities, strict=True)) if can(*facts)]
    area, left = rectangular_shares([shares[i] for i in able], [grids[i] for i in able])
    out = list(shares)
    lacking = []
    for i, a in zip(able, area, strict=True):
        out[i] = a
        lacking.append((a - shares[i], i))
    heapify(lacking)
    while left:
        short, i = heappop(lacking)
        if out[i] < capacities[i]:
            out[i], left = out[i] + 1, left - 1
            heappush(lacking, (short + 1, i))
    return out


@register_method(
    "quota",
    paper="QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
    year=2026,
    url="https://arxiv.org/abs/2503.08689",
    complexity="O(ND), and a forward per frame for score='self'",
    memory="O(ND)",
    query_aware=True,
    merges=True,
    video=True,
    presets={"paper": {"score": "self", "normalize": "vocab", "decouple": True}},
    checked=Checked(
        "MAC-AutoML/QuoTA",
        "token assignment with and without the cap (20,000 random videos), the five reducers on the golden vectors",
        "scorer, prompts and decoupling are our own words; frames are not blown up beyond their tokens",
    ),
)
@dataclass(frozen=True)
class Quota(QuestionScored):
    """QuoTA (AAAI 2026): frames get tokens in proportion to their squared relevance to the question.

    What the published code does wrong, and what is done here instead:
    - truncating and rounding to rectangles wastes 3 to 20 % of the budget; here it is met exactly: water-filling,
      largest remainders, and, for reducers that need rectangles, these chosen so that next to nothing is left over
      (that rest lengthens single rows).
    - one dominant frame gets more tokens than it has (it is blown up) in the first variant; the others cap shares in
      one pass that shares the excess out unevenly (60 24 10 6 % with a cap of 25 become 25 25 17 10). Here the surplus
      flows to the other frames in proportion to their shares.
    - scores that are all 0 or NaN raise; here they count as equal, and a single NaN as 0.
    - model output is passed to eval() and regexes that fail leave variables undefined; see frames.decouple.
    - its token merging raises NameError and counts a mean of three tokens like one token; here means are weighted.
      compat="published" restores truncation, shapes, caps and plain means (not the upsampling: a frame holds no more
      tokens than it has).

    power: exponent of the score. minimum: tokens that every frame keeps, as far as the budget reaches (the paper: 0; 1
    guards against a scorer that is wrong, which costs the paper itself 10 points on VNBench without decoupling).
    reducer: what happens inside a frame when no connector method is given: "bilinear" (the paper's best), "avgpool",
    "linspace", "tome" or "tome_separable". How frames are scored: `score` and the fields after it. The paper's own
    scorer is Qwen2-VL-2B with decoupled questions: preset="paper" (score="self", normalize="vocab", decouple=True) with
    apply(..., scorer=(small_model, its_processor)); without a scorer the model itself is asked. How many frames the
    paper reads of a video: `read_video(path, frames="quota")`, `--frames quota`.
    """

    power: float = option(2.0, low=0, high=100, hint="0 treats all frames alike.")
    minimum: int = option(0, low=0, hint="It is tokens per frame; 0 lets frames vanish.")
    reducer: Literal["bilinear", "avgpool", "linspace", "tome", "tome_separable"] = "bilinear"
    compat: Compat = "corrected"

    @property
    def inside(self) -> ConnectorMethod:
        """What happens inside a frame."""
        return FrameReducer(self.reducer, self.compat == "published")

    def allocate_by(self, worth: Tensor, tokens: VisualTokens, keep: int) -> list[int]:
        """Tokens that each frame may keep. One host synchronisation."""
        scores, sizes = worth.double().tolist(), tokens.layout.group_sizes
        if self.compat == "published":
            return self._published(scores, sizes, keep)
        return quota_shares(scores, keep, sizes, self.power, self.minimum)

    def fit(self, shares: list[int], tokens: VisualTokens) -> list[int]:
        """The shares as rectangles, where the reducer needs these."""
        if self.reducer not in RECTANGULAR or self.compat == "published":
            return shares
        return fit_rectangles(shares, tokens.layout.grids, tokens.layout.group_sizes, self.minimum)

    def _published(self, scores: list[float], sizes: Sequence[int], keep: int) -> list[int]:
        cap = None if self.reducer == "bilinear" else max(sizes)
        counts = published_shares([(100 * max(s, 0.0)) ** self.power for s in scores], keep, cap)
        if self.reducer in RECTANGULAR:
            counts = [h * w for h, w in map(published_shape, counts)]
        counts = [min(c, n) for c, n in zip(counts, sizes, strict=True)]
        if not any(counts):
            raise OptionError(
                f"QuoTA's published code truncates every frame's share of {keep} tokens to 0; ask for more, or use "
                f"compat='corrected'."
            )
        return counts
