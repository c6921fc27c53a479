"""Structure facts of packed towers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and GLM-4V."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Ref
from tokprune.runtime.encoder.tower import BlockParts, Heads, Tower

BLOCKS = (
    "Qwen2VLVisionBlock",
    "Qwen2_5_VLVisionBlock",
    "Qwen3VLVisionBlock",
    "Qwen3VLMoeVisionBlock",
    "Qwen3_5VisionBlock",
    "Glm4vVisionBlock",
)


def is_tower(module: nn.Module) -> bool:
    """Whether this is such a tower."""
    blocks = getattr(module, "blocks", None)
    return blocks is not None and len(blocks) > 0 and type(blocks[0]).__name__ in BLOCKS


def _heads(attention: Any, seen: Mapping[str, Tensor]) -> Heads:
    q, k, v = seen["qkv"].unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    return q, k, v


def _parts(block: Any) -> BlockParts:
    attention = block.attn
    return BlockParts(
        block=block,
        entry=block.norm1,
        attention=attention,
        middle=block.norm2,
        tail=block.mlp,
        seen={"qkv": attention.qkv},
        heads=functools.partial(_heads, attention),
        scale=float(attention.scaling),
    )


def _window_order(root_ref: Ref, grid: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    root = root_ref()
    index, _ = get_vision_window_index(
        grid,
        spatial_merge_size=root.spatial_merge_size,
        window_size=root.window_size,
        patch_size=root.patch_size,
        kwargs=dict(kwargs),
    )
    return index


def tower(root: Any, owner: Any, vlm: bool = True) -> Tower:
    """The tower `root`."""
    found = list(root.blocks)
    taps = zip(getattr(root, "deepstack_merger_list", ()), getattr(root, "deepstack_visual_indexes", ()), strict=False)
    return Tower(
        family=type(root).__name__,
        root_ref=Ref(root),
        owner_ref=Ref(owner),
        blocks=tuple(_parts(b) for b in found),
        depth=len(found),
        prefix=0,
        cls=False,
        fold=int(root.spatial_merge_size) ** 2,
        packed=True,
        taps=tuple((module, int(index)) for module, index in taps),
        vlm=vlm,
        grids=functools.partial(_window_order, Ref(root)) if hasattr(root, "window_size") else None,
    )
