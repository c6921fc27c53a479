"""The encoder stage: token reduction inside vision towers, attached by hooks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "EncoderStage": "tokprune.runtime.encoder.stage",
    "EncoderTrace": "tokprune.runtime.encoder.run",
    "apply_encoder": "tokprune.runtime.handle",
    "remove_encoder": "tokprune.runtime.handle",
}
__all__ = ["EncoderStage", "EncoderTrace", "apply_encoder", "remove_encoder"]

if TYPE_CHECKING:
    from tokprune.runtime.encoder.run import EncoderTrace
    from tokprune.runtime.encoder.stage import EncoderStage
    from tokprune.runtime.handle import apply_encoder, remove_encoder


def __getattr__(name: str) -> Any:
    if name == "EncoderPruning":
        import warnings

        from tokprune.runtime.handle import Pruning

        warnings.warn(
            "EncoderPruning is tokprune.Pruning now: one handle for all models.", DeprecationWarning, stacklevel=2
        )
        return Pruning
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tokprune.runtime.encoder' has no attribute {name!r}")
