"""Plain ViTs of transformers as the tower of a LLaVA: the encoder stage, its survivors and the signals behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.encoder.all_towers import close, settle
from tests.encoder.hf_vits import BASE, dense
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import reach

TEXT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE, COUNT = 90, 64
TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "vit": ({}, 1),
    "dinov2": ({}, 1),
    "dinov3_vit": ({"num_register_tokens": 0}, 1),
    "aimv2_vision_model": ({"use_head": False}, 0),
}


def llava(kind: str, layer: int) -> tuple[Any, dict[str, Tensor]]:
    """A LLaVA with a tower of this kind, and a prompt for each of two pictures."""
    hf = pytest.importorskip("transformers")
    options, prefix = TOWERS[kind]
    vision = hf.CONFIG_MAPPING[kind](**{**BASE, **options})
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if prefix else "full",
    )
    ids = torch.tensor([[1, *[IMAGE] * COUNT, 5, 6]] * 2)
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return settle(hf.LlavaForConditionalGeneration(config)), {"input_ids": ids, "pixel_values": pictures}


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_the_llm_gets_what_a_dense_forward_would_give_it(kind: str, layer: int) -> None:
    (model, inputs), prefix = llava(kind, layer), TOWERS[kind][1]
    plain, seen = model(**inputs).logits, {}
    with apply_encoder(model, "tome", r=0):
        assert torch.equal(model(**inputs).logits, plain)
    pruning = apply_encoder(model, "tome", r=6)
    blocks = [part.block for part in pruning.encoder.tower.blocks]
    watch = blocks[0].register_forward_pre_hook(
        lambda m, a, kw: seen.update(kw, x=a[0] if a else kw["hidden_states"]), with_kwargs=True
    )
    got = model.base_model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    watch.remove(), pruning.remove()
    outs = dense(blocks, seen["x"], 6, prefix, seen.get("position_embeddings"))
    # LLaVA takes hidden states, of which the last is not normed.
    wanted = model.base_model.multi_modal_projector(outs[layer][:, prefix:])
    close(torch.stack(list(got)), wanted, atol=1e-5, rtol=1e-5)
    assert pruning.encoder.tower.depth == 5 + layer
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_signals_exist_and_survivors_reach_the_llm(kind: str) -> None:
    model, inputs = llava(kind, -2)
    seen = reach(model, inputs)
    assert all(answer.works for answer in seen.signals.values()), seen.signals
    assert ("no [CLS]" in seen.signals["cls_attention"].detail) == (TOWERS[kind][1] == 0)
    assert seen.encoder["tome"].works
    with tokprune.apply(model, ["tome", "divprune"], ratio=0.25) as pruning:
        model(**inputs)
    assert [len(stream.selection) for stream in pruning.last.streams] == [16, 16]
