"""The encoder stage: token reduction inside vision towers, attached by hooks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "EncoderStage": "tokprune.adapters.splice.stage",
    "EncoderTrace": "tokprune.adapters.splice.run",
    "apply_encoder": "tokprune.adapters.handle",
    "remove_encoder": "tokprune.adapters.handle",
}
__all__ = ["EncoderStage", "EncoderTrace", "apply_encoder", "remove_encoder"]

if TYPE_CHECKING:
    from tokprune.adapters.handle import apply_encoder, remove_encoder
    from tokprune.adapters.splice.run import EncoderTrace
    from tokprune.adapters.splice.stage import EncoderStage


def __getattr__(name: str) -> Any:
    if name == "EncoderPruning":
        import warnings

        from tokprune.adapters.handle import Pruning

        warnings.warn(
            "EncoderPruning is tokprune.Pruning now: one handle for all models.", DeprecationWarning, stacklevel=2
        )
        return Pruning
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tokprune.adapters.splice' has no attribute {name!r}")
