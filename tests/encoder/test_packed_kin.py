"""Packed towers that are built as Qwen's or GLM-4V's: merging equals the dense forward, and nothing merged changes
nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.encoder.all_towers import close, hooks, settle
from tests.encoder.test_vlm_towers import dense_qwen
from tokprune.runtime.encoder import apply_encoder

CLIP = torch.tensor([[1, 4, 8], [2, 8, 4]])
PICTURES = torch.tensor([[1, 4, 8], [1, 8, 4], [1, 8, 4]])  # how GLM writes the frames of a clip
FRAMES = [8, 8, 8]
SIZES = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64}
SIZES |= {"out_hidden_size": 32, "num_position_embeddings": 64, "image_size": 32, "deepstack_visual_indexes": [0, 1]}
TOWERS = {
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
    "qwen3_5_moe": "Qwen3_5MoeVisionModel",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionEncoder",
    "qwen4_exp": "Qwen4ExpVisionModel",
    "glm4v_moe": "Glm4vMoeVisionModel",
    "cohere_compass": "CohereCompassVisionModel",
}


def tower(kind: str) -> Any:
    pytest.importorskip("transformers")
    cls = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), TOWERS[kind])
    config = cls.config_class or cls.config
    fields = {**SIZES, "num_attention_heads": 4, "num_hidden_layers": 3}
    known = {name: value for name, value in fields.items() if name in config.__dataclass_fields__}
    return settle(cls._from_config(config(**known), attn_implementation="sdpa"))


def planes(out: Any) -> list[Tensor]:
    return [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_packed_kin_equal_a_dense_forward(kind: str) -> None:
    model, calls, grid = tower(kind), [], PICTURES if kind == "glm4v_moe" else CLIP
    rows = int(grid.prod(-1).sum())
    pixels = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    plain, before = planes(model(pixels, grid_thw=grid)), hooks(model)
    with apply_encoder(model, "tome", r=0):
        assert all(torch.equal(a, b) for a, b in zip(planes(model(pixels, grid_thw=grid)), plain, strict=True))
    watch = [
        block.register_forward_pre_hook(
            lambda m, a, kw: calls.append({**kw, "x": a[0] if a else kw["hidden_states"]}), with_kwargs=True
        )
        for block in model.blocks
    ]
    model(pixels, grid_thw=grid)
    assert [h.remove() for h in watch]
    _, outs = dense_qwen(model, calls, FRAMES, r=2)
    last: dict[str, Tensor] = {}
    with apply_encoder(model, "tome", r=2) as pruning:
        end = model.blocks[-1].register_forward_hook(lambda m, a, out: last.update(x=out))
        got = planes(model(pixels, grid_thw=grid))
        end.remove()
        groups = pruning.trace.assign
    close(last["x"], outs[-1], atol=1e-5, rtol=1e-5)
    mergers, indexes = getattr(model, "deepstack_merger_list", ()), getattr(model, "deepstack_visual_indexes", ())
    for plane, index, module in zip(got[1:], indexes, mergers, strict=True):
        close(plane, module(outs[index]), atol=1e-5, rtol=1e-5)
    assert pruning.trace.survivor.split(FRAMES)[0].sum() == 2  # 8 units, 2 less in each block
    for number in groups.unique().tolist():
        same = got[0][groups == number]
        close(same, same[:1].expand_as(same), atol=1e-5, rtol=1e-5)
    assert hooks(model) == before
    assert all(torch.equal(a, b) for a, b in zip(planes(model(pixels, grid_thw=grid)), plain, strict=True))
