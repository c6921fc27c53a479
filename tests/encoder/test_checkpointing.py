"""Gradient checkpointing under every method: the same gradients, or a refusal; never gradients that are missing without
a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import slow_unless
from tests.encoder.all_towers import TOWERS, output, pixels
from tests.encoder.test_pixels import given
from tests.encoder.test_vlm_towers import two_images
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build

OPTIONS: dict[str, dict[str, Any]] = {
    "tome": {"r": 6},
    "tofu": {"r": 6},
    "pitome": {},
    "evit": {},
    "zerotprune": {},
    "ipcv": {},
}
NAMES = ("timm", "clip", "siglip", "internvl", "internvl qk norm", "open_clip")


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output(model, pixels())[-1].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model: Any, reentrant: bool) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    else:
        model.set_grad_checkpointing(True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_same_gradients_or_a_refusal(name: str, method: str, reentrant: bool) -> None:
    model = TOWERS[name]().train()
    if reentrant and not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this library checkpoints in the non-reentrant way")
    apply_encoder(model, method, **OPTIONS[method])
    plain = gradients(model)
    checkpointed(model, reentrant)
    if reentrant or (method == "ipcv" and name in ("timm", "open_clip")):
        with pytest.raises(UnsupportedModelError, match="checkpointing"):
            gradients(model)
        return
    torch.testing.assert_close(gradients(model), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "method", "ratio"),
    [
        ("internvl", "tome", 0.4),
        ("qwen2_5_vl", "tome", 0.4),
        ("qwen2_5_vl", "pixelprune", None),
        slow_unless(False, "llava", "pixelprune", None),
    ],
)
def test_vlms_compute_the_short_sequence_again(family: str, method: str, ratio: float | None) -> None:
    tiny = build(family)
    model, inputs = tiny.model.train(), given(tiny)
    tokprune.apply(model, method, ratio=ratio)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = run()
    checkpointed(model, reentrant=False)
    torch.testing.assert_close(run(), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("method", ["tome", "pitome", "evit"])
def test_reentrant_checkpointing_of_vlms_is_refused(family: str, method: str) -> None:
    tiny = build(family)
    model, inputs = tiny.model.train(), two_images(tiny)
    tokprune.apply(model, method, ratio=0.4)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(UnsupportedModelError, match="use_reentrant"):
        model(**inputs).logits.square().mean().backward()


def test_several_blocks_under_one_checkpoint() -> None:
    from timm.models import checkpoint_seq

    model = TOWERS["timm"]().train()
    apply_encoder(model, "tome", r=7)
    plain = gradients(model)
    blocks = model.blocks
    model.forward_features = lambda x, **kw: model.norm(checkpoint_seq(blocks, _embedded(model, x), every=2))
    torch.testing.assert_close(gradients(model), plain, atol=1e-6, rtol=1e-5)


def _embedded(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


def test_many_forwards_before_their_backwards() -> None:
    """No limit on how many runs may wait for their backward."""
    model = TOWERS["clip"]().train()
    apply_encoder(model, "tome", r=7)
    xs = [pixels(1, seed) for seed in range(12)]

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        losses = [model(x).last_hidden_state.square().mean() for x in xs]
        for loss in losses:
            loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = run()
    checkpointed(model, reentrant=False)
    for a, b in zip(plain, run(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not any(r.held() for r in vars(model)["_tokprune"].encoder._splice.past)
