"""VTW: from one layer on no visual tokens are left."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokprune.errors import OptionError
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens, at_layers
from tokprune.methods.options import option
from tokprune.registry import Checked, register_method
from tokprune.schedule import Schedule
from tokprune.tokens import Selection


@register_method(
    "vtw",
    paper="Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference",
    year=2025,
    url="https://arxiv.org/abs/2405.05803",
    complexity="none",
    memory="O(K)",
    checked=Checked(
        "lzhxmu/VTW", agrees="what is withdrawn and where, read from the code", differs="not run beside it"
    ),
)
@dataclass(frozen=True)
class VTW(DecoderMethod):
    """Visual tokens withdrawal (AAAI 2025, section 3.2): all visual tokens leave in front of one layer, text goes on.

    layer: by default 15 of 32 as published for LLaVA-1.5-7B, in proportion for other depths; the paper searches for it
    (the first layer whose withdrawal moves the next token's distribution by no more than a threshold, 0.003 there):
    `tokprune search --method vtw --strategy withdraw --score kl --max-kl 0.003`.
    Text keeps its position ids. How much is left is the layer's to say: no ratio, no budget.
    """

    layer: int | None = option(None, low=1)

    def plan(self, depth: int, share: float | None) -> Schedule:
        """One step that leaves nothing."""
        if share is not None:
            raise OptionError(
                "'vtw' leaves no visual token behind its layer, so that neither ratio nor budget can be met. Leave "
                "them out and give the layer: apply(model, 'vtw', layer=15)."
            )
        return Schedule(tuple((layer, 0.0) for layer in at_layers(self.layer, (15,), depth)))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """Nothing, or the first where a schedule wants some."""
        return Selection(torch.arange(keep, device=tokens.visual.device))
