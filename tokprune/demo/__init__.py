"""The demo VLM: a small but real LLaVA that comes with the package and answers questions about drawn scenes.

    model, processor = tokprune.demo.load()
    examples = tokprune.demo.held_out(120)
    scorer = tokprune.demo.load_scorer()          # the CLIP that shares its vision tower
    model, processor = tokprune.demo.load_clips()  # its sibling for clips, with the same tower

It sees 128 px pictures as 256 visual tokens, has a tower with a meaningful [CLS], and has never been trained on pruned
tokens, so its accuracy says something about a pruning method. Importing this module imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clips import held_out_clips
    from .loading import load, load_clips, load_scorer
    from .scenes import held_out

__all__ = ["held_out", "held_out_clips", "load", "load_clips", "load_scorer"]
_PUBLIC = dict(zip(__all__, ("scenes", "clips", "loading", "loading", "loading"), strict=True))


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"tokprune.demo.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'tokprune.demo' has no attribute {name!r}")
