"""A method of your own that scores tokens, run on the embedded demo VLM. `python examples/own_method.py`

A third-party package registers it by an entry point instead, and users then write method="brightest":

    [project.entry-points."tokprune.methods"]
    brightest = "my_package.brightest"
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.methods.base import ScoreMethod
from tokprune.methods.options import option
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens


def brightness(features: Tensor, attention: Tensor, mix: float) -> Tensor:
    """Length of each feature, weighed by the attention of [CLS]. features: (N, D), attention: (N,) -> (N,)."""
    length = features.float().norm(dim=-1)  # (N,)
    return length / length.max() * (1 - mix) + attention.float() / attention.max() * mix


@register_method("brightest", paper="an example, not a paper", complexity="O(ND)")
@dataclass(frozen=True)
class Brightest(ScoreMethod):
    """Keeps the longest and most attended tokens.

    mix: share of the attention in the score, ours.
    """

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    mix: float = option(0.5, low=0, high=1)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Worth of each token, higher = keep. Returns (N,)."""
        return brightness(tokens.features, tokens.signal("cls_attention"), self.mix)


def main() -> None:
    """Ask three questions with and without the method."""
    model, processor = tokprune.demo.load()
    asker = Asker(model, processor)
    examples = tokprune.demo.held_out(3)
    inputs = asker.inputs(examples)
    print("all tokens:", asker.answers(inputs))
    with tokprune.apply(model, "brightest", ratio=0.25) as pruning:
        print("a quarter: ", asker.answers(inputs))
        print(pruning.report())


if __name__ == "__main__":
    main()
