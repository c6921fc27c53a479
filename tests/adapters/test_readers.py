"""Attention modules that project, norm or turn in a way of their own: what is read from them is what their eager code
computes, and what cannot be read says so."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.encoder.all_towers import settle
from tests.encoder.hf_vits import VITS
from tokprune.adapters.tower_kinds import reader_of
from tokprune.adapters.towers import tower_blocks
from tokprune.errors import MissingSignalError
from tokprune.runtime.probe import AttentionProbe, Projections

pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4, "intermediate_size": 64}
PACKED = {"depth": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64}
LLAMA4 = {
    "image_size": 32,
    "intermediate_size": 128,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}
SAM = {"image_size": 32, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64}


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def padded_places() -> Tensor:
    """(2, 64, 2) column and row of each patch; the last four of the first picture are padding."""
    places = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).flatten(0, 1)
    places = places.expand(2, -1, -1).clone()
    places[0, 60:] = -1
    return places


GRIDS = {"grid_thw": torch.tensor([[1, 4, 8], [1, 8, 4]])}
GEMMA4 = {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 64}
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma4": (
        "Gemma4VisionModel",
        {**SIZES, **GEMMA4},
        {"pixel_values": noise(2, 64, 48), "pixel_position_ids": padded_places()},
    ),
    "llama4": ("Llama4VisionModel", {**SIZES, **LLAMA4}, {"pixel_values": noise(2, 3, 32, 32)}),
    "qwen2_5_omni": (
        "Qwen2_5OmniVisionEncoder",
        {**PACKED, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32},
        {"hidden_states": noise(64, 96), **GRIDS},
    ),
    "minimax_m3_vl": ("MiniMaxM3VLVisionModel", SIZES, {"pixel_values": noise(64, 96), **GRIDS}),
    "exaone4_5": (
        "Exaone4_5_VisionModel",
        {**PACKED, "num_key_value_heads": 2, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32},
        {"hidden_states": noise(64, 96), **GRIDS},
    ),
    "lfm3_vl": (
        "Lfm3VlVisionModel",
        {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "full_attention"]},
        {"pixel_values": noise(64, 96), **GRIDS},
    ),
}
BARE = ("deit", "dinov2 registers", "dinov3", "sapiens2", "beit", "beit shared", "aimv2")


def tower(kind: str) -> tuple[Any, dict[str, Any]]:
    """A tiny tower and how it is called."""
    if kind in BARE:
        return VITS[kind][0](), {"pixel_values": noise(2, 3, 32, 32)}
    name, options, call = TOWERS[kind]
    cls = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)
    config = cls.config_class or cls.config
    return settle(cls._from_config(config(**options), attn_implementation="sdpa")), call


def eager_maps(model: Any, call: dict[str, Any], run: Callable[..., Any] | None = None) -> dict[int, list[Tensor]]:
    """What the modules' eager attention hands back, (B, H, n, n) in calling order, by the attention's id. run: what
    takes the call, where that is not the tower itself.
    """
    module, found, before = sys.modules[type(model).__module__], {}, {}
    for name in [n for n in vars(module) if n.endswith("eager_attention_forward")]:
        before[name] = getattr(module, name)

        def listen(attention: Any, *args: Any, original: Any = before[name], **more: Any) -> Any:
            result = original(attention, *args, **more)
            found.setdefault(id(attention), []).append(result[1].detach())
            return result

        setattr(module, name, listen)
    model.set_attn_implementation("eager")
    try:
        (run or model)(**call)
    finally:
        for name, original in before.items():
            setattr(module, name, original)
        model.set_attn_implementation("sdpa")
    return found


def received(maps: list[Tensor], seen: Projections) -> Tensor:
    """(B, N) mean over heads and over the queries that are real and see the token."""
    if seen.segments is not None:
        return torch.cat([m.mean((1, 2)) for m in maps], 1)
    weights = maps[0].mean(1)
    visible = weights > 0
    real = visible.any(1)[:, :, None]
    return (weights * real).sum(1) / (visible & real).sum(1).clamp(min=1)


@pytest.mark.parametrize("kind", [*TOWERS, *BARE])
@torch.no_grad()
def test_what_is_read_is_what_eager_attention_computes(kind: str) -> None:
    model, call = tower(kind)
    blocks = tower_blocks(model)
    readable = [i for i, block in enumerate(blocks) if reader_of(block) is not None]
    assert readable == ([1, 2] if kind == "lfm3_vl" else list(range(len(blocks))))
    with AttentionProbe(model, readable) as probe:
        model(**call)
        for block, maps in zip(readable, eager_maps(model, call).values(), strict=True):
            seen = probe.projections(block)
            if kind == "llama4":  # [CLS] is its last token and is read as the first
                maps = [m.roll((1, 1), (2, 3)) for m in maps]
            if kind == "gemma4":
                maps = [m * call["pixel_position_ids"].ge(0).all(-1)[:, None, :, None] for m in maps]
            torch.testing.assert_close(seen.received(), received(maps, seen), atol=2e-6, rtol=0)
            if seen.segments is None:
                row = maps[0].mean(1)[:, 0]
                torch.testing.assert_close(seen.cls_row(), row, atol=2e-6, rtol=0)


@torch.no_grad()
def test_llama4s_rotary_table_is_read_as_it_is_whatever_the_model_was_cast_to() -> None:
    model, call = tower("llama4")
    assert model.rotary_embedding.freqs_ci.is_complex()
    with AttentionProbe(model, [0]) as probe:
        model(**call)
        first = probe.projections(0).received()
        model.rotary_embedding.freqs_ci = model.rotary_embedding.freqs_ci.real  # what model.to(dtype) makes of it
        (maps, *_) = eager_maps(model, call).values()
        model(**call)
        again = probe.projections(0)
        torch.testing.assert_close(again.received(), maps[0].roll(1, 3).mean((1, 2)), atol=2e-6, rtol=0)
    assert not torch.allclose(first, again.received())


@torch.no_grad()
def test_values_and_keys_are_those_that_gemma4_attends_with() -> None:
    model, call = tower("gemma4")
    attention = tower_blocks(model)[1].self_attn
    given: dict[str, Tensor] = {}
    watch = attention.register_forward_pre_hook(lambda m, a, kw: given.update(x=kw["hidden_states"]), with_kwargs=True)
    with AttentionProbe(model, [1]) as probe:
        model(**call)
        seen = probe.projections(1)
    watch.remove()
    for got, name in ((seen.q, "q"), (seen.k, "k"), (seen.v, "v")):
        heads = getattr(attention, f"{name}_proj")(given["x"]).unflatten(-1, (-1, 8))
        torch.testing.assert_close(got, getattr(attention, f"{name}_norm")(heads).transpose(1, 2))


def test_positions_per_query_are_refused() -> None:
    """SAM and its kin: their logits are more than queries times keys."""
    for kind, name in (("sam", "SamVisionModel"), ("got_ocr2", "GotOcr2VisionEncoder")):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        cls = getattr(module, name)
        config = getattr(module, "SamVisionConfig" if kind == "sam" else "GotOcr2VisionConfig")
        with pytest.raises(MissingSignalError, match="positions relative to each query"):
            tower_blocks(cls(config(**SIZES, **SAM)))
