"""PromptDistill: after a middle layer only what the prompt's last token points at goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.decoder_base import DecoderScores, LayerTokens, at_layers
from tokprune.methods.options import Compat, option
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule


def smoothed(values: Tensor, width: int, compat: Compat = "corrected") -> Tensor:
    """Mean over `width` neighbours, an odd number. values: (N,) -> (N,).

    At the ends only what is there counts; "published": as many zeros as are missing count, too.
    """
    if not len(values):
        return values
    published = compat == "published"
    pooled = torch.nn.functional.avg_pool1d(
        values[None], width, stride=1, padding=width // 2, count_include_pad=published
    )
    return pooled[0]


@register_method(
    "promptdistill",
    paper="PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large Language "
    "Model Inference",
    year=2025,
    url="https://arxiv.org/abs/2503.23274",
    complexity="O(nD)",
    memory="O(n)",
    checked=Checked(
        "declare-lab/PromptDistill",
        agrees='scores and choice in a text prompt, where all tokens are candidates, with compat="published"',
        differs="candidates are visual tokens, smoothed within their picture; zeros at the ends; the cuts in the cache",
    ),
)
@dataclass(frozen=True)
class PromptDistill(DecoderScores):
    """PromptDistill (2025) on visual tokens: scores are the raw products of the last query and the keys, head mean.

    It was published for text, where all tokens in front of the prompt's end compete; here the visual tokens do, and
    text stays. layers: in front of which tokens go; 14 is behind the published layer 13 of 32, in proportion for other
    depths; several are allowed and keep equal factors. smooth: each score is the mean over so many neighbours in raster
    order, within a picture (1: none). There is no published amount for pictures, so a ratio is needed.
    compat="published" counts zeros at the ends of a picture, as there at the ends of the prompt. Its
    cache_truncation_end, which cuts the keys of earlier layers afterwards, is not part of this stage.
    """

    layers: tuple[int, ...] | None = option(None, low=1, filled=True, example=(14,))
    smooth: int = option(5, low=1)
    compat: Compat = "corrected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smooth % 2 == 0:
            raise OptionError(
                f"smooth={self.smooth} has no middle; write an odd number such as smooth=5, or 1 for none."
            )

    @property
    def exact(self) -> bool:
        return True

    def plan(self, depth: int, share: float | None) -> Schedule:
        if share is None:
            raise OptionError("promptdistill has no published amount for pictures; write ratio=0.1, or schedule=.")
        return Schedule.geometric(at_layers(self.layers, (14,), depth), share)

    def scores(self, tokens: LayerTokens) -> Tensor:
        """Smoothed products of the last query with the candidates' keys. (V,)"""
        values = tokens.below.logits(tokens.last)[0, tokens.visual]
        parts = values.split(tokens.pictures[1])
        return torch.cat([smoothed(part, self.smooth, self.compat) for part in parts]) if parts else values
