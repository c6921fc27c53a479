"""PyramidDrop: tokens are dropped in stages, each time by what the prompt's last token looks for in the next layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.decoder_base import DecoderScores, LayerTokens, in_depth
from tokprune.methods.options import Compat, option
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


@register_method(
    "pyramiddrop",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    year=2025,
    url="https://arxiv.org/abs/2410.17247",
    complexity="O(ND) per stage, for one row of attention and the keys of one layer",
    memory="O(n)",
    checked=Checked(
        "Cooperx521/PyramidDrop",
        agrees="the golden vectors of its ranking and dropping, three stages in a row",
        differs="the default counts as all methods here do where the code cuts fractions off (compat='published')",
    ),
)
@dataclass(frozen=True)
class PyramidDrop(DecoderScores):
    """PyramidDrop (CVPR 2025, section 3.3): in front of several layers a share of the visual tokens stays.

    Tokens are ranked by the softmax row of the prompt's last token, mean over heads, that the layer behind the drop
    would have were nothing dropped. layers: 8, 16, 24 of 32 as published, in proportion for other depths where they are
    not given. shares: of the tokens that entered the LLM, 0.5, 0.25 and 0.125; with `apply(..., ratio=)` equal factors
    from stage to stage that end at it. Positions are numbered without gaps at each stage, as published;
    `apply(..., positions="keep")` leaves them. (On M-RoPE, where the paper says nothing, gaps are closed axis by axis,
    as for connector methods.) All pictures of a prompt are ranked together; the code knows one.

    compat="published": fractions of counts are cut off where `shares` say how many stay.
    """

    positions: ClassVar[Literal["keep", "compact"]] = "compact"
    layers: tuple[int, ...] | None = option(None, low=1, filled=True, example=(8, 16, 24))
    shares: tuple[float, ...] = option((0.5, 0.25, 0.125), low=0, high=1, filled=True)
    compat: Compat = "corrected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and len(self.layers) != len(self.shares):
            raise OptionError(
                f"layers={self.layers!r} and shares={self.shares!r} of 'pyramiddrop' need one share for each layer."
            )
        Schedule(tuple(zip(self.layers or range(1, len(self.shares) + 1), self.shares, strict=True)))

    def plan(self, depth: int, share: float | None) -> Schedule:
        """The stages that an LLM of this depth has room for."""
        if self.layers is None:
            stages = len(self.shares)
            layers = in_depth([32 * (i + 1) // (stages + 1) for i in range(stages)], depth) or (1,)
        else:
            layers = self.layers
        if share is None:
            return Schedule(tuple(zip(layers, self.shares, strict=False)))
        return Schedule.geometric(layers, share)

    def scores(self, tokens: LayerTokens) -> Tensor:
        """Attention of the last token in the layer itself, (V,)."""
        return tokens.own.weights(tokens.last)[0, tokens.visual]

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        if self.compat == "published" and not tokens.bound:
            stage = len(tokens.notes)
            tokens.notes[f"stage {stage}"] = tokens.last
            keep = int(tokens.total * self.shares[stage])
        return super().select(tokens, keep)
