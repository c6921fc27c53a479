"""Kinds of vision towers in which tokens can be reduced: how each is recognised and what is particular to it.

A new kind is a class here and its place in KINDS; signals, encoder stage and profiler then know it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tokprune.adapters.hooks import Ref
from tokprune.adapters.patch_sizes import embedder
from tokprune.adapters.tower_parts import NORMS, AttentionReader, BlockParts, Heads, Tower, attention_of, child
from tokprune.adapters.types import ModelCall
from tokprune.errors import UnsupportedModelError


class TowerKind(ABC):
    """One kind of vision tower."""

    part_of_open_clip: ClassVar[bool] = False
    """open_clip models hold such towers as `visual`, `trunk` or `visual.trunk`."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a tower of this kind."""

    def reader(self, block: nn.Module) -> AttentionReader | None:
        """What reads the attention of `block`, where this kind reads it in a way of its own; else None."""
        return None

    @abstractmethod
    def parts(self, block: Any) -> BlockParts:
        """The parts of one block, or an error that says why its sequence cannot be shortened."""

    @abstractmethod
    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        """The tower `root` of the model `owner`, whose connector joins side x side patches to a token."""

    def plain(self, root: nn.Module, owner: nn.Module, blocks: Iterable[nn.Module]) -> Tower:
        """A tower of these blocks of which nothing else is known."""
        parts = tuple(self.parts(block) for block in blocks)
        return Tower(type(root).__name__, Ref(root), Ref(owner), blocks=parts, depth=len(parts))


def is_a(module: object, package: str, name: str) -> bool:
    """Whether a module's class is, or derives from, the class `name` of a package that need not be installed."""
    return any(c.__module__.startswith(package + ".") and c.__name__ == name for c in type(module).__mro__)


# -- transformers: CLIP, SigLIP, SigLIP 2, Idefics 3, InternVL ------------------------------------------------


def block_order(side: int, n: int) -> Tensor:
    """(n,) raster numbers of a square grid, block by block of side x side, each in raster order."""
    width = math.isqrt(n)
    if width * width != n or width % side:
        raise UnsupportedModelError(
            f"{n} patches are no square grid of {side} x {side} blocks, which this model's connector joins."
        )
    return torch.arange(n).view(width // side, side, width // side, side).transpose(1, 2).reshape(-1)


def _rows_behind(table: nn.Embedding, prefix: int) -> Tensor:
    return table.weight[prefix:]


class ClipLike(TowerKind):
    """Towers of transformers with a batch of equal pictures and an `encoder` of pre-norm blocks."""

    ONE_TABLE = ("CLIPEncoderLayer", "SiglipEncoderLayer")
    """Blocks of towers whose positions are one table, so that patches may be made larger."""
    CLIP = (*ONE_TABLE, "Siglip2EncoderLayer", "Idefics3EncoderLayer", "SmolVLMEncoderLayer")
    INTERNVL = ("InternVLVisionLayer",)

    @staticmethod
    def layers(module: nn.Module) -> list[nn.Module]:
        """The blocks; none where this is no tower. Text encoders have no patch embedding."""
        encoder, embeddings = child(module, "encoder"), child(module, "embeddings")
        layers = child(encoder, "layers") or child(encoder, "layer")
        patches = child(embeddings, "patch_embedding") or child(embeddings, "patch_embeddings")
        return list(layers) if isinstance(layers, nn.ModuleList) and patches is not None else []

    def matches(self, module: nn.Module) -> bool:
        layers = self.layers(module)
        return bool(layers) and type(layers[0]).__name__ in self.CLIP + self.INTERNVL

    def parts(self, block: Any) -> BlockParts:
        if type(block).__name__ in self.INTERNVL:
            reader, after = AttentionReader(block.attention), functools.partial(getattr, block, "lambda_2", None)
            return BlockParts(block, block.layernorm_before, reader, block.layernorm_after, block.dropout, after)
        return BlockParts(block, block.layer_norm1, AttentionReader(block.self_attn), block.layer_norm2, block.mlp)

    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        layers, embeddings = self.layers(root), root.embeddings
        cls = hasattr(embeddings, "class_embedding") or getattr(embeddings, "cls_token", None) is not None
        tower = replace(
            self.plain(root, owner, layers),
            prefix=int(cls),
            cls=cls,
            fold=side * side,
            unit_order=functools.partial(block_order, side) if side > 1 else None,
            pools=getattr(root, "head", None) is not None or bool(getattr(root.config, "use_mean_pooling", False)),
        )
        patch, table = child(embeddings, "patch_embedding"), child(embeddings, "position_embedding")
        known = type(layers[0]).__name__ in self.ONE_TABLE and side == 1
        if not known or not isinstance(table, nn.Embedding) or not isinstance(patch, nn.Conv2d):
            return tower
        after = child(root, "pre_layrnorm") or nn.Identity()
        embed = embedder(patch, functools.partial(_rows_behind, table, int(cls)), after)
        return replace(tower, patch=patch, embed=embed)


# -- transformers: packed towers ------------------------------------------------------------------------------


def _window_order(root_ref: Ref, grid: Tensor, kwargs: ModelCall) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    root = root_ref()
    sizes = {name: getattr(root, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
    return get_vision_window_index(grid, **sizes, kwargs=dict(kwargs))[0]


class QwenLike(TowerKind):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and GLM-4V: all pictures in one sequence, rotary positions."""

    BLOCKS = (
        "Qwen2VLVisionBlock",
        "Qwen2_5_VLVisionBlock",
        "Qwen3VLVisionBlock",
        "Qwen3VLMoeVisionBlock",
        "Qwen3_5VisionBlock",
        "Glm4vVisionBlock",
    )

    def matches(self, module: nn.Module) -> bool:
        blocks = child(module, "blocks")
        return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and type(blocks[0]).__name__ in self.BLOCKS

    def parts(self, block: Any) -> BlockParts:
        return BlockParts(block, block.norm1, AttentionReader(block.attn), block.norm2, block.mlp)

    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        mergers, indexes = getattr(root, "deepstack_merger_list", ()), getattr(root, "deepstack_visual_indexes", ())
        return replace(
            self.plain(root, owner, root.blocks),
            fold=int(root.spatial_merge_size) ** 2,
            packed=True,
            taps=tuple((module, int(index)) for module, index in zip(mergers, indexes, strict=False)),
            vlm=True,
            grids=functools.partial(_window_order, Ref(root)) if hasattr(root, "window_size") else None,
        )


# -- timm -----------------------------------------------------------------------------------------------------


class TimmReader(AttentionReader):
    """timm: norms see (B, H, N, d) and are always called; rotary positions are one table that spares the prefix."""

    def watched(self) -> dict[str, nn.Module]:
        norms = {name: self.attention.get_submodule(name) for name in NORMS if child(self.attention, name)}
        return {**super().watched(), **norms}

    def read(self, seen: Mapping[str, Tensor]) -> Heads:
        q, k, v = super().read({name: x for name, x in seen.items() if name not in NORMS})
        return seen.get("q_norm", q), seen.get("k_norm", k), v

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


def _positions(model_ref: Ref) -> Tensor | None:
    model = model_ref()
    table = model.pos_embed
    if table is None:
        return None
    return table[0] if model.no_embed_class else table[0, model.num_prefix_tokens :]  # type: ignore[no-any-return]


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
        embed = model.patch_embed
        patch = embed.proj if type(embed).__name__ == "PatchEmbed" else None  # hybrids: sees a network's features
        if not isinstance(patch, nn.Conv2d) or patch.kernel_size != patch.stride:
            return tower
        if not isinstance(embed.norm, nn.Identity):  # it stands before the positions are added
            return tower
        config = getattr(model, "pretrained_cfg", None) or {}
        normal = (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else None
        grown = embedder(patch, functools.partial(_positions, tower.root_ref), model.norm_pre)
        return replace(tower, patch=patch, embed=grown, normal=normal)


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
        return replace(tower, rope=True)


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


def _patch_positions(root_ref: Ref) -> Tensor:
    return root_ref().positional_embedding[1:]  # type: ignore[no-any-return]


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
            embed=embedder(root.conv1, functools.partial(_patch_positions, Ref(root)), root.ln_pre),
            normal=None if mean is None or std is None else (tuple(mean), tuple(std)),
        )


KINDS: tuple[TowerKind, ...] = (TimmEva(), TimmViT(), OpenClip(), ClipLike(), QwenLike())
KNOWN = (
    "timm (EVA included) and open_clip ViTs, and CLIP, SigLIP, SigLIP 2, InternVL and Qwen-VL towers of transformers, "
    "alone or in a VLM"
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
    return None if attention is None else AttentionReader(attention)
