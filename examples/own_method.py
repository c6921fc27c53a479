"""A method of your own in twenty lines, run on the embedded demo VLM. `python examples/own_method.py`

A third-party package registers it by an entry point instead, and users then write method="brightest":

    [project.entry-points."tokprune.methods"]
    brightest = "my_package.brightest"
"""

from dataclasses import dataclass

import tokprune.demo
from tokprune.demo.evaluation import answer
from tokprune.methods.base import ConnectorMethod, top
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


@register_method("brightest", paper="an example, not a paper", complexity="O(ND)")
@dataclass(frozen=True)
class Brightest(ConnectorMethod):
    """Keeps the tokens of largest norm."""

    power: float = 2.0

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """The `keep` tokens of largest norm."""
        return Selection(top(tokens.features.float().norm(p=self.power, dim=-1), keep))


def main() -> None:
    """Ask three questions with and without the method."""
    model, processor = tokprune.demo.load()
    examples = tokprune.demo.held_out(3)
    questions, images = [e.question for e in examples], [e.image for e in examples]
    print("all tokens:", answer(model, processor, questions, images))
    with tokprune.apply(model, "brightest", ratio=0.25) as pruning:
        print("a quarter: ", answer(model, processor, questions, images))
        print(pruning.report())


if __name__ == "__main__":
    main()
