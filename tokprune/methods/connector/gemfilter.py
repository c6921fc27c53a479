"""GemFilter: tokens stay whose keys the prompt's last query matches in a middle layer, in a first pass of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from tokprune.errors import OptionError
from tokprune.methods.base import ScoreMethod
from tokprune.methods.options import Block, option
from tokprune.ops.numeric import wide
from tokprune.registry import Checked, register_method
from tokprune.tokens import VisualTokens


def pooled(logits: Tensor, window: int) -> Tensor:
    """Mean of each value and its neighbours, what lies outside counted as 0. logits: (..., N) -> (..., N)."""
    x = wide(logits)
    mean = F.avg_pool1d(x.reshape(-1, 1, x.shape[-1]), window, stride=1, padding=window // 2)
    return mean.view_as(x)


@register_method(
    "gemfilter",
    paper="Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    year=2024,
    url="https://arxiv.org/abs/2409.17422",
    complexity="O(N log N) behind layers 0 ... layer of the LLM",
    memory="O(N)",
    checked=Checked(
        "SalesforceAIResearch/GemFilter",
        agrees="the chosen indices, with and without pooling",
        differs="words always stay and only visual tokens are chosen; each picture by itself",
    ),
)
@dataclass(frozen=True)
class GemFilter(ScoreMethod):
    """GemFilter (arXiv 2409.17422) on visual tokens: the LLM reads the prompt twice, first up to `layer` to choose.

    The first pass runs layers 0 ... layer - 1 and the projections of `layer` without a cache; then the LLM starts anew
    on the tokens that stay. Positions are numbered anew where they are one-dimensional, as published
    (`positions="compact"` does it for M-RoPE, too). Products of the last query with every key count before scale and
    softmax, summed over heads; here they are scaled means, which rank alike.

    layer: 13 of the 32 of Llama-3.1-8B as published, as a fraction of the depth. window: of the mean over neighbours in
    the order of the sequence, 5 as published; 1 switches it off.
    """

    layer: Block = 0.42
    window: int = option(5, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window % 2 == 0:
            raise OptionError(f"window={self.window} has no middle; write an odd number such as window=5.")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the prompt's last token pays in `layer`, before the softmax."""
        return (f"llm_logits:{self.layer}",)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Mean over neighbours of the products with the last query, (N,)."""
        return pooled(tokens.signal(self.needs[0]), self.window)
