"""tokprune: run vision-language models on a tenth of their visual tokens.

pruning = tokprune.apply(model, method="divprune", ratio=0.1)
model.generate(**inputs)
pruning.remove()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module. Imported on first use: `import tokprune` must stay light.
_PUBLIC = {
    "apply": "tokprune.api",
    "remove": "tokprune.api",
    "Pruning": "tokprune.api",
    "PruneConfig": "tokprune.config",
    "get_method": "tokprune.registry",
    "list_methods": "tokprune.registry",
    "register_method": "tokprune.registry",
    "Layout": "tokprune.tokens",
    "Merge": "tokprune.tokens",
    "Query": "tokprune.tokens",
    "Selection": "tokprune.tokens",
    "VisualTokens": "tokprune.tokens",
    "TokpruneError": "tokprune.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from tokprune.api import Pruning, apply, remove
    from tokprune.config import PruneConfig
    from tokprune.errors import TokpruneError
    from tokprune.registry import get_method, list_methods, register_method
    from tokprune.tokens import Layout, Merge, Query, Selection, VisualTokens


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tokprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
