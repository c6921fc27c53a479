"""A tower of every kind: of timm, of transformers, of open_clip; and how tests look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.published.bipartite import unmerge
from tokprune.ops.merge import bipartite_matching, merge_weighted

close = torch.testing.assert_close


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every mistake visible."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.4))
    return model.eval()


def timm_vit(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    base = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    return settle(timm.models.vision_transformer.VisionTransformer(**{**base, **options}))


def hf_tower(name: str, **options: Any) -> nn.Module:
    hf = pytest.importorskip("transformers")
    base = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 4,
    }
    config = getattr(hf, f"{name}VisionConfig")(**{**base, **options})
    return settle(getattr(hf, f"{name}VisionModel")(config))


def open_clip_tower(**options: Any) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    base = {"image_size": 32, "patch_size": 4, "width": 24, "layers": 4, "heads": 3, "mlp_ratio": 2.0, "output_dim": 8}
    return settle(transformer.VisionTransformer(**{**base, **options}))


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm layer scale": lambda: timm_vit(init_values=0.1),
    "timm qk norm": lambda: timm_vit(qk_norm=True),
    "timm registers": lambda: timm_vit(reg_tokens=4),
    "timm average": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm map": lambda: timm_vit(class_token=False, global_pool="map"),
    "timm distilled": lambda: settle(
        __import__("timm.models.deit", fromlist=["x"]).VisionTransformerDistilled(
            img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=5
        )
    ),
    "clip": lambda: hf_tower("CLIP", projection_dim=8),
    "siglip": lambda: hf_tower("Siglip"),
    "internvl": lambda: hf_tower("InternVL", image_size=[32, 32], patch_size=[4, 4]),
    "internvl qk norm": lambda: hf_tower("InternVL", image_size=[32, 32], patch_size=[4, 4], use_qk_norm=True),
    "open_clip": open_clip_tower,
    "open_clip layer scale": lambda: open_clip_tower(ls_init_value=0.1),
    "open_clip average": lambda: open_clip_tower(pool_type="avg"),
}


towers = pytest.mark.parametrize("name", TOWERS)


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    out = model(x, **kwargs)
    if isinstance(out, Tensor):
        return [out]
    return [t for t in out.to_tuple() if isinstance(t, Tensor)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def parts(block: nn.Module) -> tuple[Callable[..., Tensor], ...]:
    """entry norm, (x -> q, k, v heads), output projection, middle norm, MLP branch of a block, as plain functions."""
    kind = type(block).__name__

    def heads(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    if kind == "Block":
        a = block.attn

        def qkv(x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = a.qkv(x).chunk(3, -1)
            return a.q_norm(heads(q, a.num_heads)), a.k_norm(heads(k, a.num_heads)), heads(v, a.num_heads)

        return block.norm1, qkv, lambda y: block.ls1(a.proj(y)), block.norm2, lambda y: block.ls2(block.mlp(y))
    if kind == "ResidualAttentionBlock":
        a = block.attn

        def packed(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                heads(t, a.num_heads) for t in nn.functional.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
            )

        return block.ln_1, packed, lambda y: block.ls_1(a.out_proj(y)), block.ln_2, lambda y: block.ls_2(block.mlp(y))
    if kind == "InternVLVisionLayer":
        a = block.attention

        def normed(x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = a.q_norm(a.q_proj(x)), a.k_norm(a.k_proj(x)), a.v_proj(x)
            return tuple(heads(t, a.num_heads) for t in (q, k, v))

        project = lambda y: block.lambda_1 * a.projection_layer(y)  # noqa: E731
        return block.layernorm_before, normed, project, block.layernorm_after, lambda y: block.lambda_2 * block.mlp(y)
    a = block.self_attn

    def three(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads(t, a.num_heads) for t in (a.q_proj(x), a.k_proj(x), a.v_proj(x)))

    return block.layer_norm1, three, a.out_proj, block.layer_norm2, block.mlp


def written_out(model: nn.Module, x: Tensor, r: int, prefix: int, blocks: Any) -> list[Tensor]:
    """Outputs of the blocks under ToMe, at full length, without hooks: explicit attention over merged tokens."""
    size, whole, outs = None, lambda t: t, []
    for block in blocks:
        entry, qkv, project, middle, branch = parts(block)
        q, k, v = qkv(entry(x))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if size is not None:
            logits = logits + size.log()[:, None, None, :, 0]
        x = x + project((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        matching = bipartite_matching(k.mean(1), r, prefix)
        x, size = merge_weighted(matching, x, size)
        whole = (lambda inner, m: lambda t: inner(unmerge(m, t)))(whole, matching)
        x = x + branch(middle(x))
        outs.append(whole(x))
    return outs
