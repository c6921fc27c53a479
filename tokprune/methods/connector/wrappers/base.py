"""The field that all registered wrappers share."""

from __future__ import annotations

from typing import Any

from tokprune.methods.connector.divprune import DivPrune
from tokprune.methods.options import option


def wrapped() -> Any:
    """The field `method` of a wrapper: any connector method, or the name of one; DivPrune by default."""
    return option(factory=DivPrune, hint="It wraps a connector method, such as method=DivPrune().")
