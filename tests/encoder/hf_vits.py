"""Tiny plain ViTs of transformers and torchvision, and what a dense forward without hooks makes of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.encoder.all_towers import settle
from tests.published.bipartite import unmerge
from tokprune.ops.merge import bipartite_matching, merge_weighted

BASE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
}


def hf_vit(config: str, model: str, **options: Any) -> nn.Module:
    hf = pytest.importorskip("transformers")
    made = getattr(hf, config)(**{**BASE, **options})
    made._attn_implementation = "sdpa"
    return settle(getattr(hf, model)(made))


def of_module(kind: str, config: str, model: str, **options: Any) -> nn.Module:
    """A tower that transformers does not export."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    made = getattr(module, config)(**{**BASE, **options})
    return settle(getattr(module, model)._from_config(made, attn_implementation="sdpa"))


def torchvision_vit() -> nn.Module:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    return settle(vision.VisionTransformer(32, 4, 4, 3, 24, 48, num_classes=5))


SAPIENS = {"num_key_value_heads_per_layer": [1, 3, 1, 3], "use_qk_norm": True, "num_register_tokens": 2}
RADIO = {"max_img_size": 32, "mlp_ratio": 2.0, "num_cls_tokens": 2, "num_registers": 3, "summary_idxs": [0]}
BEIT = {"drop_path_rate": 0.0, "use_mean_pooling": False}
QIANFAN = {"image_size": (32, 32), "patch_size": (4, 4), "drop_path_rate": 0.0}
VITS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: hf_vit("ViTConfig", "ViTModel"), 1),
    "deit": (lambda: hf_vit("DeiTConfig", "DeiTModel"), 2),
    "vit_mae": (lambda: hf_vit("ViTMAEConfig", "ViTMAEModel", mask_ratio=0.0), 1),
    "vit_msn": (lambda: hf_vit("ViTMSNConfig", "ViTMSNModel"), 1),
    "ijepa": (lambda: hf_vit("IJepaConfig", "IJepaModel"), 0),
    "pixio": (lambda: hf_vit("PixioConfig", "PixioModel", n_cls_tokens=3), 3),
    "dinov2": (lambda: hf_vit("Dinov2Config", "Dinov2Model"), 1),
    "dinov2 swiglu": (lambda: hf_vit("Dinov2Config", "Dinov2Model", use_swiglu_ffn=True), 1),
    "dinov2 registers": (
        lambda: hf_vit("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", num_register_tokens=4),
        5,
    ),
    "dinov3": (lambda: hf_vit("DINOv3ViTConfig", "DINOv3ViTModel", num_register_tokens=4), 5),
    "sapiens2": (lambda: hf_vit("Sapiens2Config", "Sapiens2Model", **SAPIENS), 3),
    "radio": (lambda: hf_vit("RadioConfig", "RadioModel", **RADIO), 5),
    "tipsv2": (lambda: hf_vit("Tipsv2VisionConfig", "Tipsv2VisionModel", num_register_tokens=1), 2),
    "beit": (lambda: hf_vit("BeitConfig", "BeitModel", use_relative_position_bias=True, **BEIT), 1),
    "beit shared": (lambda: hf_vit("BeitConfig", "BeitModel", use_shared_relative_position_bias=True, **BEIT), 1),
    "aimv2": (lambda: hf_vit("Aimv2VisionConfig", "Aimv2VisionModel", use_head=True), 0),
    "metaclip2": (lambda: hf_vit("MetaClip2VisionConfig", "MetaClip2VisionModel"), 1),
    "altclip": (lambda: hf_vit("AltCLIPVisionConfig", "AltCLIPVisionModel"), 1),
    "chinese_clip": (lambda: hf_vit("ChineseCLIPVisionConfig", "ChineseCLIPVisionModel"), 1),
    "janus": (lambda: hf_vit("JanusVisionConfig", "JanusVisionModel"), 0),
    "owlvit": (lambda: hf_vit("OwlViTVisionConfig", "OwlViTVisionModel"), 1),
    "owlv2": (lambda: hf_vit("Owlv2VisionConfig", "Owlv2VisionModel"), 1),
    "idefics2": (lambda: of_module("idefics2", "Idefics2VisionConfig", "Idefics2VisionTransformer"), 0),
    "qianfan": (lambda: of_module("qianfan_ocr", "QianfanOCRVisionConfig", "QianfanOCRVisionModel", **QIANFAN), 1),
    "torchvision": (torchvision_vit, 1),
}
"""Model and number of tokens that are no patches."""


def heads(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, d) of an attention module."""
    if isinstance(attention, nn.MultiheadAttention):
        parts = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        size = attention.head_dim
    else:
        parts, size = [getattr(attention, f"{name}_proj")(x) for name in "qkv"], attention.head_dim
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
    q, k = getattr(attention, "q_norm", nn.Identity())(q), getattr(attention, "k_norm", nn.Identity())(k)
    return q, *(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))


def first(module: Any, *names: str) -> Any:
    """The first of these attributes that there is."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def turned(x: Tensor, table: tuple[Tensor, Tensor] | None, place: Tensor, prefix: int) -> Tensor:
    """x (B, H, K, d) with its patches rotated as their places (B, K) are."""
    if table is None:
        return x
    cos, sin = (t[(place[:, prefix:] - prefix)][:, None] for t in table)
    low, high = x[:, :, prefix:].chunk(2, -1)
    return torch.cat([x[:, :, :prefix], x[:, :, prefix:] * cos + torch.cat([-high, low], -1) * sin], 2)


def dense(
    blocks: list[Any],
    x: Tensor,
    r: int,
    prefix: int,
    rope: tuple[Tensor, Tensor] | None = None,
    tables: list[Tensor] | None = None,
) -> list[Tensor]:
    """Outputs of the blocks under ToMe, at full length: explicit attention over merged tokens.

    rope: cosine and sine of the patches, (N, d) each. tables: per block, what is added to the logits, (1, H, N, N).
    """
    size, whole, outs = torch.ones(*x.shape[:2], 1), lambda t: t, []
    place = torch.arange(x.shape[1]).expand(x.shape[:2])
    for number, block in enumerate(blocks):
        a = first(block, "attention", "self_attn", "self_attention")
        q, k, v = heads(a, first(block, "layernorm_before", "layer_norm1", "norm1", "rms_norm1", "ln_1")(x))
        logits = turned(q, rope, place, prefix) @ turned(k, rope, place, prefix).transpose(-1, -2)
        logits = logits * q.shape[-1] ** -0.5 + size.log()[:, None, None, :, 0]
        if tables is not None:
            rows = [tables[number][0][:, p][:, :, p] for p in place]
            logits = logits + torch.stack(rows)
        out = first(a, "o_proj", "out_proj", "projection_layer")((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + scaled(block, "layer_scale1", "lambda_1", out)
        matching = bipartite_matching(k.mean(1), r, prefix)
        x, size = merge_weighted(matching, x, size)
        place = place.gather(1, matching.rep)
        whole = (lambda inner, m: lambda t: inner(unmerge(m, t)))(whole, matching)
        mlp, middle = (
            first(block, "mlp", "ffn"),
            first(block, "layernorm_after", "layer_norm2", "norm2", "rms_norm2", "ln_2"),
        )
        x = x + scaled(block, "layer_scale2", "lambda_2", mlp(middle(x)))
        outs.append(whole(x))
    return outs


def scaled(block: Any, module: str, parameter: str, x: Tensor) -> Tensor:
    """A branch under the block's layer scale, if it has one."""
    return getattr(block, module)(x) if hasattr(block, module) else getattr(block, parameter, 1) * x
