"""timm's own kinds of models and what its users do with them: unchanged at r=0, reduced at r=4, or a refusal with the
reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tokprune.errors import UnsupportedModelError

timm = pytest.importorskip("timm")
SMALL = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 70},
    "vit_base_patch16_siglip_224": {},
    "vit_medium_patch16_gap_256": {},
    "vit_wee_patch16_reg1_gap_256": {},
    "flexivit_small": {},
    "vit_xsmall_patch16_clip_224": {},
    "vit_tiny_r_s16_p8_224": {},
    "vit_small_r26_s32_224": {},
    "vit_small_resnet26d_224": {},
}
REFUSED = (
    "vit_relpos_small_patch16_224",
    "vit_pwee_patch16_reg1_gap_256",
    "beit_base_patch16_224",
    "xcit_nano_12_p16_224",
)


def built(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **{**SMALL, **MODELS[name]}).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_timms_users_do(name: str) -> None:
    model = built(name)
    side = MODELS[name].get("img_size", 64)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    many = model.patch_embed.num_patches > 8
    plain, maps = model(x), model.forward_intermediates(x, [0, 2], return_prefix_tokens=True)
    with tokprune.apply(model, "tome", r=0):
        assert torch.equal(model(x), plain)
        for a, b in zip(model.forward_intermediates(x, [0, 2], return_prefix_tokens=True)[1], maps[1], strict=True):
            assert torch.equal(a[0] if isinstance(a, tuple) else a, b[0] if isinstance(b, tuple) else b)
    with tokprune.apply(model, "tome", r=4) as pruning:
        reduced = model(x)
        assert reduced.shape == plain.shape
        assert reduced.isfinite().all()
        assert not (many and torch.equal(reduced, plain))
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), reduced)
        assert model.forward_head(features, pre_logits=True).ndim == 2
        found = model.get_intermediate_layers(x, 2, reshape=True)
        assert [tuple(f.shape) for f in found] == [tuple(f.shape) for f in _plain_layers(model, x, pruning)]
    assert torch.equal(model(x), plain)


def _plain_layers(model: Any, x: torch.Tensor, pruning: Any) -> Any:
    pruning.remove()
    return model.get_intermediate_layers(x, 2, reshape=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_its_gradient(name: str) -> None:
    model = built(name).train()
    side = MODELS[name].get("img_size", 64)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def with_gradient() -> set[str]:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        return {n for n, p in model.named_parameters() if p.grad is not None}

    plain = with_gradient()
    tokprune.apply(model, "tome", r=4)
    assert with_gradient() == plain


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_blocks_are_refused_at_apply(name: str) -> None:
    model = timm.create_model(name, pretrained=False, img_size=64, depth=2)
    with pytest.raises(UnsupportedModelError, match=r"cannot be spliced|reduced inside"):
        tokprune.apply(model, "tome", r=4)


@pytest.mark.parametrize("r", [0, 4])
def test_torchscript_is_refused_with_the_reason_and_works_again_after_remove(r: int) -> None:
    model = built("vit_tiny_patch16_224")
    x = torch.randn(1, 3, 64, 64)
    pruning = tokprune.apply(model, "tome", r=r)
    for module in (model, torch.nn.Sequential(model)):
        with pytest.raises(UnsupportedModelError, match=r"torch\.jit\.script .* after remove"):
            torch.jit.script(module)
    pruning.remove()
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x))


def test_fx_is_refused_with_the_reason() -> None:
    model = built("vit_tiny_patch16_224")
    tokprune.apply(model, "tome", r=4)
    with pytest.raises(UnsupportedModelError, match=r"torch\.fx.*after remove"):
        torch.fx.symbolic_trace(torch.nn.Sequential(*model.blocks))
