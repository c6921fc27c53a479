"""Shared: the rule of one method for sharing a prompt's tokens out over its pictures, in front of another that picks
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokprune.methods.base import ConnectorMethod, Wrapper
from tokprune.methods.connector.none import NoPruning
from tokprune.methods.options import option
from tokprune.registry import MethodInfo
from tokprune.tokens import VisualTokens

PROPORTIONAL = "proportional"


@dataclass(frozen=True)
class Shared(Wrapper):
    """A method that picks, with the `budgets` of another one.

    Not registered: `apply(..., prompt_rule=...)` makes it. method: picks. rule: whose `budgets` share the tokens out;
    None leaves them as they are (in proportion to what the pictures have).
    """

    method: ConnectorMethod = option(factory=NoPruning)
    rule: ConnectorMethod | None = None

    @property
    def info(self) -> MethodInfo:  # type: ignore[override]
        """The facts of the method that picks."""
        return self.method.info

    @property
    def needs(self) -> tuple[str, ...]:
        """What both need."""
        return tuple(dict.fromkeys([*self.method.needs, *(self.rule.needs if self.rule else ())]))

    @property
    def query_aware(self) -> bool:
        """Whether one of them reads the question."""
        return self.method.query_aware or (self.rule is not None and self.rule.query_aware)

    @property
    def reads_examples(self) -> bool:
        """Whether one of them reads the words behind each picture."""
        return self.method.reads_examples or (self.rule is not None and self.rule.reads_examples)

    @property
    def exact(self) -> bool:
        """Whether the method that picks keeps exactly what it is asked to."""
        return self.method.exact

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """The rule over those pictures that can lose anything."""
        out = list(keeps)
        free = [i for i, tokens in enumerate(batch) if self.method.bounds(tokens)[0] < len(tokens)]
        if self.rule is not None and free:
            shared = self.rule.budgets([batch[i] for i in free], [keeps[i] for i in free])
            for i, keep in zip(free, shared, strict=True):
                out[i] = keep
        return out
