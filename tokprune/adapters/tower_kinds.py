"""Kinds of vision towers in which tokens can be reduced: how each is recognised and what is particular to it.

A new kind is a class here and its place in KINDS; signals, encoder stage and profiler then know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tokprune.adapters.hf_tower_kinds import PlainViT, QwenLike
from tokprune.adapters.hooks import Ref
from tokprune.adapters.patch_sizes import Embedder
from tokprune.adapters.tower_parts import (
    NORMS,
    AttentionReader,
    BlockParts,
    Heads,
    HeadsFirstReader,
    Tower,
    TowerKind,
    attention_of,
    child,
)
from tokprune.adapters.types import ModelCall
from tokprune.errors import MissingSignalError, UnsupportedModelError


def is_a(module: object, package: str, name: str) -> bool:
    """Whether a module's class is, or derives from, the class `name` of a package that need not be installed."""
    return any(c.__module__.startswith(package + ".") and c.__name__ == name for c in type(module).__mro__)


# -- timm -----------------------------------------------------------------------------------------------------


class TimmReader(HeadsFirstReader):
    """timm: norms are always called; rotary positions are one table that spares the prefix."""

    def watched(self) -> dict[str, nn.Module]:
        norms = {name: self.attention.get_submodule(name) for name in NORMS if child(self.attention, name)}
        return {**super().watched(), **norms}

    def positions(self, call: ModelCall) -> object:
        return call.get("rope")

    def check_positions(self, positions: object) -> None:
        if not isinstance(positions, Tensor | None):
            super().check_positions(positions)

    def turn(self, x: Tensor, positions: Any) -> Tensor:
        """positions: (N, D) of the patches, or (B, 1, N, D)."""
        if positions is None:
            return x
        from timm.layers import apply_rot_embed_cat

        prefix, half = getattr(self.attention, "num_prefix_tokens", 0), getattr(self.attention, "rotate_half", False)
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], positions.to(x), half=half)], 2)


class TimmViT(TowerKind):
    """timm's plain vision transformers."""

    part_of_open_clip = True
    NAME, BLOCK = "VisionTransformer", "Block"
    NEEDED: tuple[str, ...] = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "norm2", "mlp", "drop_path2")
    REFUSED = (
        "timm blocks of the kind {} with {} cannot be spliced; the plain pre-norm Block of "
        "timm.models.vision_transformer can (ViT, DeiT, DINOv2, SigLIP, CLIP and MAE towers)."
    )

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "timm.models", self.NAME)

    def reader(self, block: nn.Module) -> AttentionReader | None:
        attention = attention_of(block)
        timm = attention is not None and type(attention).__module__.startswith("timm")
        return TimmReader(attention) if attention is not None and timm else None

    def can_be_split(self, block: nn.Module) -> bool:
        """Whether the block is made of the parts that are needed."""
        if type(block).__name__ != self.BLOCK:
            return False
        return all(child(block, path) is not None for path in self.NEEDED)

    def parts(self, block: Any) -> BlockParts:
        reader = self.reader(block) if self.can_be_split(block) else None
        if reader is None:
            kinds = type(block).__name__, type(getattr(block, "attn", None)).__name__
            raise UnsupportedModelError(self.REFUSED.format(*kinds))
        return BlockParts(block, block.norm1, reader, block.norm2, block.drop_path2)

    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        cls = getattr(root, "cls_token", None) is not None
        pooled = getattr(root, "attn_pool", None) is not None
        tower = replace(
            self.plain(root, owner, root.blocks),
            family=f"timm {type(root).__name__}",
            prefix=int(getattr(root, "num_prefix_tokens", int(cls))),
            cls=cls,
            mask="attn_mask",
            pools=pooled or getattr(root, "global_pool", "token") not in ("token", ""),
            intermediates=hasattr(root, "forward_intermediates"),
        )
        return self.with_positions(tower)

    def with_positions(self, tower: Tower) -> Tower:
        """With what embeds patches, where one convolution of pixels does and their positions come next."""
        model = tower.root
        first = model.patch_embed
        patch = first.proj if type(first).__name__ == "PatchEmbed" else None  # hybrids: sees a network's features
        if not isinstance(patch, nn.Conv2d) or patch.kernel_size != patch.stride:
            return tower
        if not isinstance(first.norm, nn.Identity):  # it stands before the positions are added
            return tower
        config = getattr(model, "pretrained_cfg", None) or {}
        normal = (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else None
        skipped = 0 if model.no_embed_class else model.num_prefix_tokens
        embed = Embedder(patch, tower.root_ref, "pos_embed", skipped, model.norm_pre)
        return replace(tower, patch=patch, embed=embed, normal=normal)


@dataclass(frozen=True)
class EvaReader(TimmReader):
    """EVA: the fused projection is not always called as a module; values are made again from the attention's input."""

    entry: nn.Module
    """Norm before the attention."""

    def watched(self) -> dict[str, nn.Module]:
        return {"input": self.entry, **{name: self.attention.get_submodule(name) for name in NORMS}}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k = seen["q_norm"], seen["k_norm"]  # (B, H, N, d)
        return q, k, self.values(seen["input"]).unflatten(2, (q.shape[1], -1)).transpose(1, 2)

    def values(self, x: Tensor) -> Tensor:
        """The values of the attention's input (B, N, C)."""
        attention: Any = self.attention
        if attention.qkv is None:
            return attention.v_proj(x)  # type: ignore[no-any-return]
        bias = attention.v_bias
        if bias is None and attention.qkv.bias is not None:
            bias = attention.qkv.bias.chunk(3)[2]
        return linear(x, attention.qkv.weight.chunk(3)[2].to(x.dtype), None if bias is None else bias.to(x.dtype))


class TimmEva(TimmViT):
    """timm's EVA and EVA-02 towers: rotary positions, which follow their tokens."""

    NAME, BLOCK = "Eva", "EvaBlock"
    NEEDED = ("norm1", "attn", "norm2", "mlp", "drop_path2")
    REFUSED = (
        "EVA blocks of the kind {} with {} cannot be spliced; the pre-norm EvaBlock with EvaAttention can "
        "(EVA, EVA-02 and the towers built of them)."
    )

    def reader(self, block: nn.Module) -> AttentionReader | None:
        attention = child(block, "attn")
        known = type(block).__name__ == "EvaBlock" and type(attention).__name__ == "EvaAttention"
        return EvaReader(attention, block.get_submodule("norm1")) if known and attention is not None else None

    def with_positions(self, tower: Tower) -> Tower:
        if getattr(tower.root, "rope_mixed", False):
            raise UnsupportedModelError(
                f"{tower.family} has rotary positions of its own in every block (rope_type='mixed'), which cannot "
                "follow merged tokens."
            )
        return replace(tower, rope="rope")


# -- open_clip ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedProjectionReader(AttentionReader):
    """torch's MultiheadAttention does not show what it projects: its input is projected again."""

    entry: nn.Module
    """Norm before the attention."""

    def watched(self) -> dict[str, nn.Module]:
        return {"input": self.entry}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        attention: Any = self.attention
        x = linear(seen["input"], attention.in_proj_weight.to(seen["input"].dtype), attention.in_proj_bias)
        q, k, v = x.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class OpenClip(TowerKind):
    """open_clip's own vision transformers."""

    part_of_open_clip = True

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "open_clip", "VisionTransformer")

    def parts(self, block: Any) -> BlockParts:
        if type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.attn, nn.MultiheadAttention):
            raise UnsupportedModelError(
                f"open_clip blocks of the kind {type(block).__name__} cannot be spliced; ResidualAttentionBlock can."
            )
        if not block.attn.batch_first:
            raise UnsupportedModelError(
                "this open_clip tower runs with the batch second; build it with batch_first=True."
            )
        return BlockParts(block, block.ln_1, PackedProjectionReader(block.attn, block.ln_1), block.ln_2, block.ls_2)

    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        mean, std = getattr(root, "image_mean", None), getattr(root, "image_std", None)
        return replace(
            self.plain(root, owner, root.transformer.resblocks),
            family="open_clip VisionTransformer",
            prefix=1,
            cls=True,
            mask="key_padding_mask",
            padding=True,
            pools=root.attn_pool is not None or root.pool_type in ("avg", "none"),
            patch=root.conv1,
            embed=Embedder(root.conv1, Ref(root), "positional_embedding", 1, root.ln_pre),
            normal=None if mean is None or std is None else (tuple(mean), tuple(std)),
        )


# -- torchvision ----------------------------------------------------------------------------------------------


class TorchvisionViT(TowerKind):
    """torchvision's vision transformers, made of torch's MultiheadAttention."""

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "torchvision.models", "VisionTransformer")

    def parts(self, block: Any) -> BlockParts:
        reader = PackedProjectionReader(block.self_attention, block.ln_1)
        return BlockParts(block, block.ln_1, reader, block.ln_2, block.mlp)

    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        tower = replace(
            self.plain(root, owner, root.encoder.layers),
            family="torchvision VisionTransformer",
            prefix=1,
            cls=True,
            mask="key_padding_mask",
            padding=True,
        )
        if not isinstance(root.conv_proj, nn.Conv2d):  # a stem of several convolutions
            return tower
        embed = Embedder(root.conv_proj, Ref(root), "encoder.pos_embedding", 1)
        return replace(tower, patch=root.conv_proj, embed=embed)


# -- attention that projects, norms or turns in a way of its own, in blocks of no kind -------------------------


class Gemma4Reader(AttentionReader):
    """Gemma 4: values are normed, too, and each half of a head is turned by its own coordinate."""

    def watched(self) -> dict[str, nn.Module]:
        return {**super().watched(), "v_norm": self.attention.get_submodule("v_norm")}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, _ = super().read(seen)
        return q, k, seen["v_norm"].transpose(1, 2)

    def turn(self, x: Tensor, positions: Any) -> Tensor:
        parts = zip(x.chunk(2, -1), *(p.chunk(2, -1) for p in positions), strict=True)
        return torch.cat([super(Gemma4Reader, self).turn(half, table) for half, *table in parts], -1)


class Llama4Reader(AttentionReader):
    """Llama 4: [CLS] stands behind the patches and is read as the first token; pairs of channels turn as complex
    numbers."""

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, v = (x.roll(1, 2) for x in super().read(seen))
        return q, k, v

    def positions(self, call: ModelCall) -> object:
        return call.get("freqs_ci")

    def check_positions(self, positions: object) -> None:
        if not isinstance(positions, Tensor):
            raise MissingSignalError(f"{type(self.attention).__name__} was called without its rotary table.")

    def turn(self, x: Tensor, positions: Any) -> Tensor:
        angles = positions.flatten(0, -2).roll(1, 0).to(x.device)  # (N, d / 2)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)  # real angles where the model was cast


READERS: dict[str, type[AttentionReader]] = {
    "Gemma4VisionAttention": Gemma4Reader,
    "Llama4VisionAttention": Llama4Reader,
}
"""By the class of the attention."""


KINDS: tuple[TowerKind, ...] = (TimmEva(), TimmViT(), OpenClip(), TorchvisionViT(), PlainViT(), QwenLike())
KNOWN = (
    "ViTs of timm (EVA included), open_clip and torchvision, and of transformers ViT, DeiT, DINO, BEiT, CLIP, SigLIP, "
    "AIMv2, InternVL and Qwen-VL towers, alone or in a VLM"
)


def kind_of(module: object) -> TowerKind | None:
    """The kind of tower that a module is, or None."""
    return next((kind for kind in KINDS if isinstance(module, nn.Module) and kind.matches(module)), None)


def reader_of(block: nn.Module) -> AttentionReader | None:
    """What reads the attention of a block of any tower; None where queries and keys cannot be seen."""
    for kind in KINDS:
        reader = kind.reader(block)
        if reader is not None:
            return reader
    attention = attention_of(block)
    if attention is None or hasattr(attention, "rel_pos_h") or hasattr(attention, "relative_position_bias_table"):
        return None  # its logits are more than queries times keys: positions per query
    return READERS.get(type(attention).__name__, AttentionReader)(attention)
