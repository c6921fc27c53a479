"""A method of your own that scores tokens: registered, evaluated and drawn on the embedded demo VLM.

python examples/own_method.py

A third-party package registers it by an entry point instead, and users then write method="brightest":

    [project.entry-points."tokprune.methods"]
    brightest = "my_package.brightest"
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.demo.sweep import run_cell
from tokprune.methods.base import ScoreMethod
from tokprune.methods.options import option
from tokprune.registry import register_method
from tokprune.tokens import VisualTokens
from tokprune.viz.kept import kept_on_image


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
    """Its accuracy beside random tokens, all of them, and a picture of what it keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=70)
    parser.add_argument("--out", default="brightest.png")
    args = parser.parse_args()
    asker = Asker(*tokprune.demo.load())
    examples = tokprune.demo.held_out(args.questions)
    for method, ratio in (("none", 1.0), ("random", 0.25), ("brightest", 0.25)):
        cell = run_cell(asker, examples, method, ratio)
        print(f"{method:10} {cell.kept:5.0f} tokens  {cell.accuracy:6.1%} of {cell.questions} answers right")
    one = examples[0]
    answered = asker.ask(one.question, one.image, "brightest", 0.25)
    caption = {"brightest": f"{one.question} {answered.text}"}
    kept_on_image(one.image, {"brightest": answered.stream}, asker.processor, captions=caption).save(args.out)


if __name__ == "__main__":
    main()
