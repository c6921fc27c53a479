"""Structure facts of timm's EVA and EVA-02 towers: rotary positions, which follow their tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.hooks import Ref
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.encoder.tower import BlockParts, Heads, Tower


def is_tower(model: Any) -> bool:
    """Whether this is one of timm's EVA models."""
    return any("timm.models" in c.__module__ and c.__name__ == "Eva" for c in type(model).__mro__)


def _values(attention: Any, x: Tensor) -> Tensor:
    """The values of the block's normed input (B, N, C); the fused projection is not always called as a module."""
    if attention.qkv is None:
        return attention.v_proj(x)  # type: ignore[no-any-return]
    weight = attention.qkv.weight.chunk(3)[2].to(x.dtype)
    bias = attention.v_bias
    if bias is None and attention.qkv.bias is not None:
        bias = attention.qkv.bias.chunk(3)[2]
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _heads(attention: Any, seen: Mapping[str, Tensor]) -> Heads:
    v = _values(attention, seen["x"]).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    return seen["q"], seen["k"], v


def _parts(block: Any) -> BlockParts:
    attention: Any = getattr(block, "attn", None)
    if type(block).__name__ != "EvaBlock" or type(attention).__name__ != "EvaAttention":
        raise UnsupportedModelError(
            f"EVA blocks of the kind {type(block).__name__} with {type(attention).__name__} cannot be spliced; the pre-norm EvaBlock with "
            "EvaAttention can (EVA, EVA-02 and the towers built of them)."
        )
    return BlockParts(
        block=block,
        entry=block.norm1,
        attention=attention,
        middle=block.norm2,
        tail=block.drop_path2,
        seen={"x": block.norm1, "q": attention.q_norm, "k": attention.k_norm},
        heads=functools.partial(_heads, attention),
        scale=float(attention.scale),
    )


def rotated(attention: Any, prefix: int, rope: Tensor, x: Tensor) -> Tensor:
    """Queries or keys (B, H, N, hd) turned as the block turns them; the prefix is not turned."""
    from timm.layers import apply_rot_embed_cat

    half = getattr(attention, "rotate_half", False)
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope.to(x), half=half)], 2)


def tower(model: Any, owner: Any = None) -> Tower:
    """The tower of a timm EVA model."""
    if getattr(model, "rope_mixed", False):
        raise UnsupportedModelError(
            f"timm {type(model).__name__} has rotary positions of its own in every block (rope_type='mixed'), which cannot follow merged tokens."
        )
    blocks = tuple(_parts(b) for b in model.blocks)
    cls = getattr(model, "cls_token", None) is not None
    pools = getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", "avg") not in ("token", "")
    return Tower(
        family=f"timm {type(model).__name__}",
        root_ref=Ref(model),
        owner_ref=Ref(model if owner is None else owner),
        blocks=blocks,
        depth=len(blocks),
        prefix=int(getattr(model, "num_prefix_tokens", int(cls))),
        cls=cls,
        mask="attn_mask",
        pools=pools,
        intermediates=hasattr(model, "forward_intermediates"),
        rope=rotated,
    )
