"""FastV: tokens that the prompt's last token does not attend to in one early layer are dropped behind it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokprune.methods.decoder_base import DecoderScores, LayerTokens
from tokprune.methods.options import Compat, option
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


@register_method(
    "fastv",
    paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large VLMs",
    year=2024,
    url="https://arxiv.org/abs/2403.06764",
    complexity="O(ND) once, for one row of attention",
    memory="O(n)",
    checked=Checked(
        "pkunlp-icler/FastV",
        agrees="the golden vectors of its ranking, at three rates",
        differs="the default counts as all methods here do where the code rounds halves to even (compat='published')",
    ),
)
@dataclass(frozen=True)
class FastV(DecoderScores):
    """FastV (ECCV 2024, section 4.1): tokens are ranked by the attention of the prompt's last token.

    In front of layer `layer` the visual tokens are ranked by the softmax row of the prompt's last token in the layer
    below, mean over heads, and the best `share` of them stay, with the position ids that they had; `apply(...,
    ratio=)` sets the share. layer: K = 2 and share: 0.5, the setting of the paper's title; its table 1 has others. The
    published code reads full attention maps (eager attention, one prompt of one picture at a time); one row is made
    here from queries and keys. Its layer 0, which drops at random, is the connector method `random`.

    compat="published": halves are rounded to the even number where `share` says how many stay.
    """

    layer: int = option(2, low=1)
    share: float = option(0.5, low=0, high=1)
    compat: Compat = "corrected"

    def plan(self, depth: int, share: float | None) -> Schedule:
        """One step."""
        return Schedule(((self.layer, self.share if share is None else share),))

    def scores(self, tokens: LayerTokens) -> Tensor:
        """Attention of the last token in the layer below, (V,)."""
        return tokens.below.weights(tokens.last)[0, tokens.visual]

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        if self.compat == "published" and not tokens.bound:
            keep = min(len(tokens.visual), round(tokens.total * self.share))
        return super().select(tokens, keep)
