"""Pictures of their own size in one padded batch (Gemma 4, LFM2-VL), lines that end in newlines (HunYuan), and
projectors whose tokens stand for no place."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from tests.adapters.test_readers import GEMMA4, SIZES, noise
from tests.encoder.all_towers import settle
from tokprune.adapters.families import EncoderCall, UnknownGeometryError, family_named
from tokprune.testing import reach

SHAPES = [(4, 8), (8, 6)]


def places(shapes: list[tuple[int, int]], length: int = 64) -> Tensor:
    """(B, length, 2) column and row of each patch, padding -1."""
    out = torch.full((len(shapes), length, 2), -1)
    for picture, (height, width) in zip(out, shapes, strict=True):
        picture[: height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    return out


def call(kind: str, side: int, pooled: Any, modality: str = "image", **kwargs: Any) -> EncoderCall:
    config = SimpleNamespace(
        model_type=kind,
        downsample_factor=side,
        vision_config=SimpleNamespace(pooling_kernel_size=side, spatial_merge_size=side),
    )
    base: Any = SimpleNamespace(config=config)
    return EncoderCall(base, modality, kwargs, SimpleNamespace(pooler_output=pooled))


@torch.no_grad()
def test_gemma4s_rows_are_what_its_pooler_makes_of_the_patches() -> None:
    hf = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    model = settle(hf.Gemma4VisionModel._from_config(hf.Gemma4VisionConfig(**SIZES, **GEMMA4)))
    seen: list[Tensor] = []
    watch = model.encoder.register_forward_hook(lambda m, args, out: seen.append(out.last_hidden_state))
    rows = model(noise(2, 64, 48), pixel_position_ids=places(SHAPES)).last_hidden_state
    watch.remove()
    items = rows.split([8, 12])
    got = call("gemma4", 2, items, image_position_ids=places(SHAPES))
    family = family_named("gemma4")
    torch.testing.assert_close(family.arrange(got, seen[0].flatten(0, 1)) * 32**0.5, rows)
    assert [stream.layout.grids for stream in family.streams(got)] == [((2, 4),), ((4, 3),)]
    clip = call(
        "gemma4",
        2,
        noise(16, 3).split([16]),
        "video",
        video_position_ids=places([(4, 8)] * 2),
        num_frames_per_video=torch.tensor([2]),
    )
    (stream,) = family.streams(clip)
    assert stream.layout.kind == "video"
    assert stream.layout.grids == ((2, 4), (2, 4))
    with pytest.raises(UnknownGeometryError, match="raster order"):
        family.streams(call("gemma4", 2, items, image_position_ids=places(SHAPES).flip(1)))


def test_lfm2s_rows_are_means_of_its_blocks() -> None:
    values = noise(2 * 64, 5)
    shapes = [(5, 8), (8, 6)]  # an odd row is cut off
    got = call("lfm2_vl", 2, values[:20].split([8, 12]), spatial_shapes=torch.tensor(shapes))
    rows = family_named("lfm2_vl").arrange(got, values)
    wanted = [
        values[64 * i + (2 * y + torch.tensor([0, 0, 1, 1])) * width + 2 * x + torch.tensor([0, 1, 0, 1])].mean(0)
        for i, (height, width) in enumerate(shapes)
        for y in range(height // 2)
        for x in range(width // 2)
    ]
    torch.testing.assert_close(rows, torch.stack(wanted))
    with pytest.raises(UnknownGeometryError, match="padded pictures"):
        family_named("lfm2_vl").arrange(got, values[:50])


@torch.no_grad()
def test_lfm2s_signals_are_its_towers_at_the_places_of_its_tokens() -> None:
    hf = pytest.importorskip("transformers")
    text = hf.Lfm2Config(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        block_multiple_of=8,
    )
    vision = {**SIZES, "model_type": "siglip2_vision_model", "num_patches": 64, "vision_use_head": False}
    model = settle(
        hf.Lfm2VlForConditionalGeneration(
            hf.Lfm2VlConfig(text_config=text, vision_config=vision, downsample_factor=2, projector_hidden_size=16)
        )
    )
    real = torch.zeros(2, 64, dtype=torch.long)
    for row, (height, width) in zip(real, SHAPES, strict=True):
        row[: height * width] = 1
    inputs = {"pixel_values": noise(2, 64, 48), "spatial_shapes": torch.tensor(SHAPES), "pixel_attention_mask": real}
    seen = reach(model, inputs)
    assert all(answer.works for answer in seen.signals.values()), seen.signals
    assert "equal size" in seen.encoder["tome"].detail


@pytest.mark.parametrize("kind", ["aria", "idefics2"])
def test_tokens_of_learned_queries_stand_for_no_place(kind: str) -> None:
    """Whatever the counts: 64 queries over 64 patches are no patches."""
    family, got = family_named(kind), call(kind, 1, noise(2, 64, 5), pixel_values=noise(2, 3, 32, 32))
    for question in (family.streams, family.patches, lambda c: family.arrange(c, noise(128, 5))):
        with pytest.raises(UnknownGeometryError, match="learned queries"):
            question(got)


@pytest.mark.parametrize("kind", ["hunyuan_vl", "hy_v4_vl"])
@torch.no_grad()
def test_hunyuans_separators_are_the_rows_that_no_picture_changes(kind: str) -> None:
    """Begin, newlines and end come from parameters; every other row from the patches that its signal is the mean of."""
    name = {"hunyuan_vl": "HunYuanVL", "hy_v4_vl": "HYV4VL"}[kind]
    if kind not in CONFIG_MAPPING:
        pytest.skip("the installed transformers has no such type")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    width = {"text_hidden_size": 6} if kind == "hunyuan_vl" else {"out_hidden_size": 6}
    config = getattr(module, f"{name}VisionConfig")(**{**SIZES, "hidden_size": 8, "spatial_merge_size": 2, **width})
    merger = settle(getattr(module, f"{name}VisionPatchMerger")(config))
    grid, family = torch.tensor([[1, 4, 6], [1, 8, 4]]), family_named(kind)
    first, second = (
        [merger(noise(2, h * w, 8)[i][None], size=(h, w))[0] for _, h, w in grid.tolist()] for i in range(2)
    )
    got = call(kind, 2, first, image_grid_thw=grid)
    streams = family.streams(got)
    assert [s.layout.grids for s in streams] == [((2, 3),), ((4, 2),)]
    for stream, a, b in zip(streams, first, second, strict=True):
        assert stream.total == len(a)
        fixed = (a == b).all(1).nonzero()[:, 0]
        assert torch.equal(stream.separators, fixed)
        assert torch.equal(stream.rows, (a != b).any(1).nonzero()[:, 0])
    values = noise(24 + 32, 3)
    rows = family.arrange(got, values, fill=7.0).split([s.total for s in streams])
    for stream, part, patches, (_, h, w) in zip(streams, rows, values.split([24, 32]), grid.tolist(), strict=True):
        assert (part[stream.separators] == 7).all()
        means = patches.view(h // 2, 2, w // 2, 2, 3).mean((1, 3)).flatten(0, 1)
        torch.testing.assert_close(part[stream.rows], means)
        ends = stream.rows.view(h // 2, w // 2)[:, -1] + 1  # the newline behind each line is its own
        newline = stream.separators[1:-1] if kind == "hunyuan_vl" else stream.separators
        assert torch.equal(newline, ends)
    with pytest.raises(UnknownGeometryError, match="are not the patches"):
        family.arrange(got, values[:-1])


def test_special_tokens_in_front_of_each_packed_picture_are_cut() -> None:
    """RADIO's summary tokens in Nemotron Omni, [CLS] in Inkling 2: what is left is the mean of each token's patches."""
    values, grids = noise(3 + 16 + 3 + 8, 5), torch.tensor([[4, 4], [2, 4]])
    got = call("nemotron_h_omni", 2, [noise(4, 5), noise(2, 5)], image_grid_hw=grids)
    got.vision_config.num_summary_tokens = 3
    wanted = [
        part.view(h // 2, 2, w // 2, 2, 5).mean((1, 3)).flatten(0, 1)
        for part, (h, w) in zip((values[3:19], values[22:]), grids.tolist(), strict=True)
    ]
    torch.testing.assert_close(family_named("nemotron_h_omni").arrange(got, values), torch.cat(wanted))
    grid = torch.tensor([[1, 2, 2], [1, 1, 2]])  # in tokens
    got = call("inkling2", 2, [noise(4, 5), noise(2, 5)], image_grid_thw=grid)
    values = noise(1 + 16 + 1 + 8, 5)
    rows = family_named("inkling2").arrange(got, values)
    torch.testing.assert_close(rows, torch.cat([values[1:17], values[18:]]).view(-1, 4, 5).mean(1))
    assert [s.layout.grids for s in family_named("inkling2").streams(got)] == [((2, 2),), ((1, 2),)]
    with pytest.raises(UnknownGeometryError, match=r"and \[CLS\]"):
        family_named("inkling2").arrange(got, values[1:])
