"""Structure facts of timm's plain vision transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Ref
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.encoder.patches import embedder
from tokprune.runtime.encoder.tower import BlockParts, Heads, Tower


def is_tower(model: Any) -> bool:
    """Whether this is one of timm's vision transformers."""
    return any("timm.models" in c.__module__ and c.__name__ == "VisionTransformer" for c in type(model).__mro__)


def _heads(attention: Any, seen: Mapping[str, Tensor]) -> Heads:
    batch, n, _ = seen["qkv"].shape
    v = seen["qkv"].reshape(batch, n, 3, attention.num_heads, -1)[:, :, 2].transpose(1, 2)
    return seen["q"], seen["k"], v


def _parts(block: Any) -> BlockParts:
    attention: Any = getattr(block, "attn", None)
    needed = ("norm1", "attn", "norm2", "mlp", "drop_path2")
    inner = ("qkv", "q_norm", "k_norm", "num_heads", "scale")
    if (
        type(block).__name__ != "Block"
        or not all(hasattr(block, n) for n in needed)
        or not all(hasattr(attention, n) for n in inner)
    ):
        raise UnsupportedModelError(
            f"timm blocks of the kind {type(block).__name__} with {type(attention).__name__} cannot be spliced; the plain pre-norm Block of "
            "timm.models.vision_transformer can (ViT, DeiT, DINOv2, SigLIP, CLIP and MAE towers)."
        )
    return BlockParts(
        block=block,
        entry=block.norm1,
        attention=attention,
        middle=block.norm2,
        tail=block.drop_path2,
        seen={"qkv": attention.qkv, "q": attention.q_norm, "k": attention.k_norm},
        heads=functools.partial(_heads, attention),
        scale=float(attention.scale),
    )


def _positions(model_ref: Ref) -> Tensor | None:
    model = model_ref()
    table = model.pos_embed
    if table is None:
        return None
    return table[0] if model.no_embed_class else table[0, model.num_prefix_tokens :]  # type: ignore[no-any-return]


def _entrance(model: Any) -> dict[str, Any]:
    """Facts for methods that choose patch sizes, of models that embed patches by one convolution."""
    if (
        type(model.patch_embed).__name__ != "PatchEmbed"
    ):  # the hybrids' convolution sees a network's features, not pixels
        return {}
    patch = model.patch_embed.proj
    if not isinstance(patch, nn.Conv2d) or patch.kernel_size != patch.stride:
        return {}
    norm, pre = model.patch_embed.norm, model.norm_pre
    if not isinstance(norm, nn.Identity):  # it stands before the positions are added
        return {}
    config = getattr(model, "pretrained_cfg", None) or {}
    normal = (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else None
    return {"patch": patch, "embed": embedder(patch, functools.partial(_positions, Ref(model)), pre), "normal": normal}


def tower(model: Any, owner: Any = None) -> Tower:
    """The tower of a timm vision transformer."""
    blocks = tuple(_parts(b) for b in model.blocks)
    cls = getattr(model, "cls_token", None) is not None
    pools = getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", "token") not in ("token", "")
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
        **_entrance(model),
    )
