"""DART in the LLM: keep what resembles a few strong tokens of picture and text least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.budget import even_steps
from tokprune.methods.base import check_finite
from tokprune.methods.connector.dart import least_similar, strongest
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.methods.options import Compat, option
from tokprune.ops.numeric import wide
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


def dart_llm(
    normed: Tensor, keys: Tensor, visual: Tensor, text: Tensor, keep: int, pivots: tuple[int, int] = (4, 4)
) -> Tensor:
    """Places of the visual tokens that stay, ascending. (keep,)

    normed: (n, D) hidden states behind the last norm. keys: (H, n, d) of the layer below, whose L1 norm says who is
    strong. visual: (V,) and text: (T,) places. Pivots are the strongest of both, visited picture first, each by falling
    norm; the picture's stay, and each pivot in turn keeps the free tokens of the lowest cosine to it.
    """
    norms = wide(keys).abs().sum((0, 2))  # (n,)
    own = visual[strongest(norms[visual], min(pivots[0], keep))]
    visit = torch.cat([own, text[strongest(norms[text], pivots[1])]])
    free = torch.zeros(len(norms), dtype=torch.bool, device=norms.device)
    free[visual] = True
    free[visit] = False
    picks = least_similar(wide(normed), visit, even_steps(keep - len(own), len(visit)), free)
    return torch.cat([own, picks]).sort().values


@register_method(
    "dart_llm",
    paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    year=2025,
    url="https://arxiv.org/abs/2502.11494",
    complexity="O(PnD)",
    memory="O(nD)",
    checked=Checked(
        "ZichenWen1/DART",
        agrees="pivots, and what is kept for its counts and order of visit",
        differs="exact counts (there 4 + 8 * (keep // 8)); pivots by falling norm of keys before rotation (there "
        "in the order of a Python set, of rotated keys)",
    ),
)
@dataclass(frozen=True)
class DartLLM(DecoderMethod):
    """DART (EMNLP 2025) where it was published, in front of layer 2: pivots of picture and text, then the least alike.

    pivots: how many of the picture and of the text behind it. Without a ratio 132 of 576 tokens stay, as its scripts
    leave with 128. Differences from the published code: exactly `keep` tokens stay, what does not divide goes to the
    first pivots; pivots are visited by falling norm, there in the order of a Python set, which changes 5 to 20 % of the
    kept tokens; norms are those of keys before their rotation, because the L1 norm of rotated keys changes with the
    position, so with padding (compat="published" takes the rotated ones). With several pictures all compete. The method
    `dart` is the same rule in front of the LLM.
    """

    reads: ClassVar[tuple[str, ...]] = ("normed",)
    layer: int = option(2, low=1)
    pivots: tuple[int, int] = option((4, 4), low=1)
    compat: Compat = "corrected"

    def plan(self, depth: int, share: float | None) -> Schedule:
        left = 132 / 576 if share is None else share
        return Schedule(((self.layer, left),))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """`keep` tokens, pivots among them."""
        if not keep:
            return Selection(tokens.visual[:0])
        normed = check_finite(tokens.read("normed"), "the hidden states")
        keys = tokens.below.keys if self.compat == "published" else tokens.below.plain_keys
        keys = check_finite(keys, "the keys of the layer below")
        stays = dart_llm(normed, keys, tokens.visual, tokens.behind, keep, self.pivots)
        return Selection(torch.searchsorted(tokens.visual, stays))
