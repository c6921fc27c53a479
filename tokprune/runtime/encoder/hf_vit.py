"""Structure facts of CLIP-like towers in transformers (CLIP, SigLIP, SigLIP 2, Idefics 3) and of InternVL's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.hooks import Ref
from tokprune.runtime.encoder.patches import embedder
from tokprune.runtime.encoder.tower import BlockParts, Heads, Tower
from tokprune.runtime.encoder.units import blocks as unit_blocks

CLIP_LAYERS = (
    "CLIPEncoderLayer",
    "SiglipEncoderLayer",
    "Siglip2EncoderLayer",
    "Idefics3EncoderLayer",
    "SmolVLMEncoderLayer",
)
INTERNVL_LAYERS = ("InternVLVisionLayer",)


def layers(module: nn.Module) -> list[nn.Module] | None:
    """The blocks of such a tower, or None when this is none. Text encoders have no patch embedding."""
    encoder = getattr(module, "encoder", None)
    found = getattr(encoder, "layers", getattr(encoder, "layer", None))
    embeddings = getattr(module, "embeddings", None)
    if (
        found is None
        or len(found) == 0
        or not (hasattr(embeddings, "patch_embedding") or hasattr(embeddings, "patch_embeddings"))
    ):
        return None
    return list(found) if type(found[0]).__name__ in CLIP_LAYERS + INTERNVL_LAYERS else None


def _heads(attention: Any, seen: Mapping[str, Tensor]) -> Heads:
    def split(name: str) -> Tensor:
        x = seen[name]
        return x.reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)

    return split("q"), split("k"), split("v")


def _parts(block: Any) -> BlockParts:
    internvl = type(block).__name__ in INTERNVL_LAYERS
    attention = block.attention if internvl else block.self_attn
    q, k = (attention.q_norm, attention.k_norm) if internvl else (attention.q_proj, attention.k_proj)
    return BlockParts(
        block=block,
        entry=block.layernorm_before if internvl else block.layer_norm1,
        attention=attention,
        middle=block.layernorm_after if internvl else block.layer_norm2,
        tail=block.dropout if internvl else block.mlp,
        seen={"q": q, "k": k, "v": attention.v_proj},
        heads=functools.partial(_heads, attention),
        scale=float(attention.scale),
        after=functools.partial(getattr, block, "lambda_2", None),
    )


def _positions(table: nn.Embedding, prefix: int) -> Tensor:
    return table.weight[prefix:]


def _entrance(root: Any, prefix: int) -> dict[str, Any]:
    """Facts for methods that choose patch sizes: CLIP and SigLIP. The others have positions by picture, or none."""
    kind = type(next(iter(layers(root) or ()), None)).__name__
    patch, table = (getattr(root.embeddings, name, None) for name in ("patch_embedding", "position_embedding"))
    if kind not in CLIP_LAYERS[:2] or not isinstance(patch, nn.Conv2d) or not isinstance(table, nn.Embedding):
        return {}
    after = getattr(root, "pre_layrnorm", None) or nn.Identity()
    return {"patch": patch, "embed": embedder(patch, functools.partial(_positions, table, prefix), after)}


def tower(root: Any, owner: Any, depth: int | None = None, side: int = 1, vlm: bool = False) -> Tower:
    """The tower `root`. depth: blocks that feed the output, all of them unless given. side: the connector joins side
    x side patches.
    """
    found = layers(root) or []
    cls = hasattr(root.embeddings, "class_embedding") or getattr(root.embeddings, "cls_token", None) is not None
    return Tower(
        family=type(root).__name__,
        root_ref=Ref(root),
        owner_ref=Ref(owner),
        blocks=tuple(_parts(b) for b in found),
        depth=len(found) if depth is None else depth,
        prefix=int(cls),
        cls=cls,
        fold=side * side,
        unit_order=unit_blocks(side),
        pools=getattr(root, "head", None) is not None or bool(getattr(root.config, "use_mean_pooling", False)),
        vlm=vlm,
        **(_entrance(root, int(cls)) if side == 1 else {}),
    )
