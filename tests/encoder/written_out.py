"""Halves of a transformer block, written out, and what a spliced tower feeds its blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.encoder.all_towers import output, parts


def attend(block: Any, x: Tensor) -> Tensor:
    """The attention half of a block."""
    entry, qkv, project, _, _ = parts(block)
    q, k, v = qkv(entry(x))
    weight = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return x + project((weight @ v).transpose(1, 2).flatten(2))


def think(block: Any, x: Tensor) -> Tensor:
    """The MLP half."""
    *_, middle, branch = parts(block)
    return x + branch(middle(x))


def seen_by_blocks(model: Any, pruning: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What entered the first block and left the last one under a splice."""
    seen: dict[str, Tensor] = {}
    blocks = [p.block for p in pruning.encoder.tower.blocks]
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, kw: seen.update(x=a[0]), with_kwargs=True),
        blocks[-1].register_forward_hook(lambda m, a, out: seen.update(y=out)),
    ]
    output(model, x)
    for handle in handles:
        handle.remove()
    return seen["x"], seen["y"]
