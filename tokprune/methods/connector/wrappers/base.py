"""What all wrappers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.divprune import DivPrune
from tokprune.methods.options import option
from tokprune.registry import get_method
from tokprune.tokens import VisualTokens


@dataclass(frozen=True)
class Wrapper(ConnectorMethod):
    """Base of the wrappers: passes on what the wrapped method needs. `method` is a connector method, or the name of one."""

    method: ConnectorMethod = option(factory=DivPrune, hint="It wraps a connector method, such as method=DivPrune().")

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            object.__setattr__(self, "method", get_method(self.method))
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        """What the wrapped method needs."""
        return self.method.needs

    @property
    def query_aware(self) -> bool:
        """Whether the wrapped method reads the question."""
        return self.method.query_aware

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        """The wrapped method's rule for sharing one prompt's budget out over its images."""
        return self.method.budgets(batch, keeps)
