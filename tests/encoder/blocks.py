"""A block of a vision tower as an encoder method sees it, without the tower."""

from __future__ import annotations

from typing import Any

import torch

from tokprune.methods.encoder_base import BlockView


def block(patches: int, target: int | None = None, index: int = 3, prefix: int = 1, **more: Any) -> BlockView:
    """Block `index` of 12 of a tower with [CLS] and two heads, two pictures."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, prefix + patches, 8, generator=g)
    qkv = torch.randn(3, 2, 2, prefix + patches, 4, generator=g).unbind()
    more = {"blocks": 12, "hidden_prefix": prefix, "cls": True, **more}
    return BlockView(x, index, 12, prefix, patches, lambda: qkv, 0.5, target, **more)  # type: ignore[arg-type]
