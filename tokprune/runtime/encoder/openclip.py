"""Structure facts of open_clip's own vision transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Ref
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.encoder.patches import embedder
from tokprune.runtime.encoder.tower import BlockParts, Heads, Tower


def is_tower(module: nn.Module) -> bool:
    """Whether this is the vision tower of an open_clip model."""
    return any(
        c.__module__.startswith("open_clip.") and c.__name__ == "VisionTransformer" for c in type(module).__mro__
    )


def _heads(attention: Any, seen: Mapping[str, Tensor]) -> Heads:
    """The packed projection keeps q, k and v to itself: it is applied again to the attention's input."""
    x = seen["x"]
    packed = nn.functional.linear(x, attention.in_proj_weight.to(x.dtype), attention.in_proj_bias)
    packed = packed.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = packed.unbind(0)
    return q, k, v


def _positions(root_ref: Ref) -> Tensor:
    return root_ref().positional_embedding[1:]  # type: ignore[no-any-return]


def _parts(block: Any) -> BlockParts:
    if type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.attn, nn.MultiheadAttention):
        raise UnsupportedModelError(
            f"open_clip blocks of the kind {type(block).__name__} cannot be spliced; ResidualAttentionBlock can."
        )
    if not block.attn.batch_first:
        raise UnsupportedModelError("this open_clip tower runs with the batch second; build it with batch_first=True.")
    return BlockParts(
        block=block,
        entry=block.ln_1,
        attention=block.attn,
        middle=block.ln_2,
        tail=block.ls_2,
        seen={"x": block.ln_1},
        heads=functools.partial(_heads, block.attn),
        scale=float(block.attn.head_dim**-0.5),
    )


def tower(root: Any, owner: Any) -> Tower:
    """The tower of an open_clip model."""
    blocks = tuple(_parts(b) for b in root.transformer.resblocks)
    mean, std = getattr(root, "image_mean", None), getattr(root, "image_std", None)
    return Tower(
        family="open_clip VisionTransformer",
        root_ref=Ref(root),
        owner_ref=Ref(owner),
        blocks=blocks,
        depth=len(blocks),
        prefix=1,
        cls=True,
        mask="key_padding_mask",
        padding=True,
        pools=root.attn_pool is not None or root.pool_type in ("avg", "none"),
        patch=root.conv1,
        embed=embedder(root.conv1, functools.partial(_positions, Ref(root)), root.ln_pre),
        normal=None if mean is None or std is None else (tuple(mean), tuple(std)),
    )
