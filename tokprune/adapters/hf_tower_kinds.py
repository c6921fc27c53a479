"""Kinds of vision towers of transformers in which tokens can be reduced, and why the others cannot."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokprune.adapters.hooks import Ref
from tokprune.adapters.patch_sizes import Embedder
from tokprune.adapters.tower_parts import (
    AttentionReader,
    BlockParts,
    HeadsFirstReader,
    Tower,
    TowerKind,
    child,
    no_scale,
)
from tokprune.adapters.types import ModelCall
from tokprune.errors import UnsupportedModelError


def block_order(side: int, n: int) -> Tensor:
    """(n,) raster numbers of a square grid, block by block of side x side, each in raster order."""
    width = math.isqrt(n)
    if width * width != n or width % side:
        raise UnsupportedModelError(
            f"{n} patches are no square grid of {side} x {side} blocks, which this model's connector joins."
        )
    return torch.arange(n).view(width // side, side, width // side, side).transpose(1, 2).reshape(-1)


# -- towers with a batch of equal pictures ------------------------------------------------------------------------


class Names(NamedTuple):
    """What the parts of a pre-norm block are called; see BlockParts."""

    entry: str
    attention: str
    middle: str
    tail: str
    after: str = ""


CLIP = Names("layer_norm1", "self_attn", "layer_norm2", "mlp")
VIT = Names("layernorm_before", "attention", "layernorm_after", "dropout")
DINO = Names("norm1", "attention", "norm2", "drop_path")
AIM = Names("rms_norm1", "attention", "rms_norm2", "ffn")

ONE_TABLE: dict[str, Names] = {
    **dict.fromkeys(("CLIPEncoderLayer", "SiglipEncoderLayer", "MetaClip2EncoderLayer"), CLIP),
    **dict.fromkeys(("ViTLayer", "DeiTLayer", "ViTMSNLayer", "IJepaLayer"), VIT),
    **dict.fromkeys(("Dinov2Layer", "Dinov2WithRegistersLayer"), DINO),
    "PixioLayer": VIT._replace(tail="drop_path"),
}
"""Blocks of towers whose positions are one table that the first block's input has just got: patches may be larger."""
BLOCKS: dict[str, Names] = {
    **ONE_TABLE,
    **dict.fromkeys(("Siglip2EncoderLayer", "Idefics3EncoderLayer", "SmolVLMEncoderLayer"), CLIP),
    **dict.fromkeys(("AltCLIPEncoderLayer", "ChineseCLIPVisionLayer", "JanusVisionEncoderLayer"), CLIP),
    **dict.fromkeys(("Idefics2EncoderLayer", "OwlViTEncoderLayer", "Owlv2EncoderLayer"), CLIP),
    **dict.fromkeys(("ViTMAELayer", "VivitLayer"), VIT),
    **dict.fromkeys(("DINOv3ViTLayer", "Sapiens2Layer", "RadioLayer", "Tipsv2VisionLayer"), DINO),
    **dict.fromkeys(("Aimv2EncoderLayer", "Ovis2VisionEncoderLayer"), AIM),
    "InternVLVisionLayer": VIT._replace(after="lambda_2"),
    "QianfanOCRVisionLayer": VIT._replace(tail="drop_path2"),
    "BeitLayer": VIT._replace(tail="drop_path"),
}
"""Pre-norm blocks whose attention takes an additive mask, by their class."""
PATCHES = ("patch_embedding", "patch_embeddings", "patch_embed", "patch_projection")
READS_CLS = ("ViTFor", "DeiTFor", "ViTMSNFor", "VivitFor")
"""Classifiers that look at [CLS] alone; others average over patches."""


def _prefix(embeddings: Any) -> int:
    """How many tokens that are no patches stand in front."""
    names = ("cls_token", "distillation_token", "register_tokens")  # (1, n, C) each
    tokens = (getattr(embeddings, name, None) for name in names)
    both = getattr(embeddings, "cls_register_token", None)  # (n, C)
    alone = int(hasattr(embeddings, "class_embedding"))
    return alone + sum(t.shape[1] for t in tokens if t is not None) + (0 if both is None else both.shape[0])


def _convolution(embeddings: nn.Module) -> nn.Conv2d | None:
    """What embeds the patches, where one convolution of pixels does."""
    for name in PATCHES:
        for path in (name, f"{name}.projection"):
            patch = child(embeddings, path)
            if isinstance(patch, nn.Conv2d):
                return patch
    return None


class PlainViT(TowerKind):
    """ViTs of transformers: CLIP, SigLIP, ViT, DeiT, DINOv2, DINOv3, BEiT, AIMv2, InternVL and their kin."""

    @staticmethod
    def layers(module: nn.Module) -> list[nn.Module]:
        """The blocks; none where this is no tower. Text encoders have no patch embedding."""
        parts = (child(module, path) for path in ("encoder.layers", "encoder.layer", "layers", "model.layer"))
        layers = next((part for part in parts if isinstance(part, nn.ModuleList) and len(part)), None)
        patches = any(child(module, f"embeddings.{name}") is not None for name in PATCHES)
        return [] if layers is None or not patches else list(layers)

    def matches(self, module: nn.Module) -> bool:
        layers = self.layers(module)
        return bool(layers) and type(layers[0]).__name__ in BLOCKS

    def reader(self, block: nn.Module) -> AttentionReader | None:
        attention = child(block, "attention")
        known = type(block).__name__ == "Sapiens2Layer" and attention is not None
        return HeadsFirstReader(attention) if known and attention is not None else None

    def parts(self, block: Any) -> BlockParts:
        names = BLOCKS[type(block).__name__]
        after = functools.partial(_scale, block, names.after) if names.after else no_scale
        reader = self.reader(block) or AttentionReader(getattr(block, names.attention))
        entry, middle, tail = (getattr(block, name) for name in (names.entry, names.middle, names.tail))
        return BlockParts(block, entry, reader, middle, tail, after)

    def tower(self, root: Any, owner: nn.Module, side: int = 1) -> Tower:
        layers, embeddings, prefix = self.layers(root), root.embeddings, _prefix(root.embeddings)
        name, kind = type(owner).__name__, type(layers[0]).__name__
        classifies = "Classification" in name
        averages = getattr(root.config, "use_mean_pooling", False) or getattr(root, "head", None) is not None
        tower = replace(
            self.plain(root, owner, layers),
            prefix=prefix,
            cls=prefix > 0,
            fold=side * side,
            unit_order=functools.partial(block_order, side) if side > 1 else None,
            pools=bool(averages) or (classifies and not name.startswith(READS_CLS)),
            dense=not name.endswith("Model") and not classifies,
            rope="position_embeddings" if hasattr(root, "rope_embeddings") else "",
            relative=kind == "BeitLayer",
            patch=_convolution(embeddings),
        )
        table = "position_embedding" if hasattr(embeddings, "position_embedding") else "position_embeddings"
        if kind not in ONE_TABLE or side > 1 or tower.patch is None or getattr(embeddings, table, None) is None:
            return tower
        registers = getattr(embeddings, "register_tokens", None)  # they have no positions
        skipped = prefix - (0 if registers is None else registers.shape[1])
        after = child(root, "pre_layrnorm") or nn.Identity()
        return replace(tower, embed=Embedder(tower.patch, tower.root_ref, f"embeddings.{table}", skipped, after))


def _scale(block: Any, name: str) -> Tensor | None:
    """The parameter `name` of a block, where it is one."""
    value = getattr(block, name, None)
    return value if isinstance(value, Tensor) else None


# -- packed towers --------------------------------------------------------------------------------------------------


def _window_order(root_ref: Ref, grid: Tensor, kwargs: ModelCall) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    root = root_ref()
    sizes = {name: getattr(root, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
    return get_vision_window_index(grid, **sizes, kwargs=dict(kwargs))[0]


def _row(config: Any) -> tuple[int, int]:
    """Channels and frames of a packed tower's patch."""
    channels = next((getattr(config, name) for name in ("in_channels", "in_chans") if hasattr(config, name)), 3)
    return int(channels), int(getattr(config, "temporal_patch_size", 1))


class QwenLike(TowerKind):
    """Qwen2-VL to Qwen4, Qwen3-Omni, GLM-4V, Cohere Compass: all pictures in one sequence, rotary positions.

    Kin whose queries and keys are normed (GLM-OCR, GLM-5 next) have no room for the size in them, and stay out.
    """

    BLOCKS = (
        "Qwen2VLVisionBlock",
        "Qwen2_5_VLVisionBlock",
        "Qwen3VLVisionBlock",
        "Qwen3VLMoeVisionBlock",
        "Qwen3_5VisionBlock",
        "Qwen3_5MoeVisionBlock",
        "Qwen3OmniMoeVisionBlock",
        "Qwen4ExpVisionBlock",
        "Glm4vVisionBlock",
        "Glm4vMoeVisionBlock",
        "CohereCompassVisionBlock",
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
            row=_row(root.config),
            taps=tuple((module, int(index)) for module, index in zip(mergers, indexes, strict=False)),
            vlm=True,
            grids=functools.partial(_window_order, Ref(root)) if hasattr(root, "window_size") else None,
        )


# -- the others -----------------------------------------------------------------------------------------------------


def why_not(module: nn.Module) -> str:
    """What is particular to `module`, a vision tower of no known kind, in a clause."""
    parts = [(type(m).__name__, m) for m in module.modules()]
    attend = [name for name, _ in parts if "Attention" in name or "Attn" in name]
    if any(hasattr(m, "window_size") for _, m in parts):
        return "its attention sees windows of the grid, or positions relative to each query"
    if any(name in ("sr_ratio", "sr") or name.endswith("_reduction_ratio") for _, m in parts for name in vars(m)):
        return "its attention reads keys that a convolution over the whole grid has made"
    if not attend:
        return "it has no transformer blocks (a convolutional network?)"
    blocks = [type(m[0]).__name__ for _, m in parts if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    blocks = [name for name in blocks if name.endswith(("Layer", "Block"))]
    return f"its blocks ({', '.join(dict.fromkeys(blocks)) or 'none found'}) are of no kind that tokprune knows"
