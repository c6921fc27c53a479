"""Presets: sizes against the published ones, token counts against the real processors, FLOPs on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.profiling.counted import language_flops
from tokprune.errors import OptionError
from tokprune.profiling import formulas
from tokprune.profiling.build import build_meta, build_random, config_of, vision_calls
from tokprune.profiling.formulas import DecoderShape
from tokprune.profiling.presets import list_presets, preset
from tokprune.profiling.stages import find_stages
from tokprune.testing import build, clip, picture


@pytest.mark.parametrize("name", list_presets())
def test_parameters_are_the_published_ones(name: str) -> None:
    known = preset(name)
    model = build_meta(known)
    assert all(p.device.type == "meta" for p in model.parameters())
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert count == pytest.approx(known.parameters, rel=0.02)
    assert known.decoder == DecoderShape.of(config_of(known))
    assert known.sources


def test_names_are_forgiving_and_wrong_ones_are_answered() -> None:
    assert preset("Qwen2.5-VL-7B").name == "qwen2.5-vl-7b"
    assert preset("llava_1.5_7b") is preset("preset:llava-1.5-7b")
    assert preset("smolvlm").name == "smolvlm-2.2b"
    with pytest.raises(OptionError, match=r"Did you mean 'qwen2.5-vl-7b'"):
        preset("qwen2.5-vl-7")


PUBLISHED = [
    ("llava-1.5-7b", (480, 640), None, 576, 0),
    ("llava-next-7b", (672, 672), None, 2880, 48),
    ("llava-onevision-7b", (384, 384), None, 1458, 27),
    ("llava-onevision-7b", (384, 384), 32, 32 * 196, 1),
    ("qwen2.5-vl-7b", (1092, 1092), None, 39 * 39, 0),
    ("qwen3-vl-4b", (1024, 1024), None, 32 * 32, 0),
    ("internvl3-8b", (448, 448), None, 256, 0),
    ("internvl3-8b", (896, 896), None, 5 * 256, 0),
    ("smolvlm-2.2b", (1536, 1536), None, 17 * 81, 0),
    ("smolvlm-256m", (512, 512), 8, 8 * 64, 0),
    ("fastvlm-0.5b", (768, 1024), None, 256, 0),
    ("gemma3-4b", (768, 1024), None, 256, 0),
]


@pytest.mark.parametrize(("name", "size", "frames", "tokens", "separators"), PUBLISHED)
def test_tokens_of_known_sizes(
    name: str, size: tuple[int, int], frames: int | None, tokens: int, separators: int
) -> None:
    got = preset(name).count(size, frames)
    assert (got.tokens, got.separators) == (tokens, separators)


# The same arithmetic with the tiny families' sizes, against what their real processors put into the prompt.
TINY = {
    "llava": ("llava-1.5-7b", {"kind": "crop", "edge": 32, "patch": 4}),
    "llava_next": ("llava-next-7b", {"kind": "anyres", "tile": 32, "patch": 4}),
    "llava_onevision": (
        "llava-onevision-7b",
        {"kind": "anyres", "tile": 32, "patch": 4, "max_tiles": 9, "frame_pool": 2},
    ),
    "qwen2_5_vl": ("qwen2.5-vl-7b", {"kind": "smart", "patch": 4, "merge": 2}),
    "internvl": ("internvl3-8b", {"kind": "tiles", "tile": 32, "patch": 4, "merge": 2, "min_tiles": 1, "max_tiles": 4}),
    "smolvlm": ("smolvlm-2.2b", {"kind": "split", "tile": 32, "patch": 4, "merge": 2, "longest": 64}),
}


@pytest.mark.parametrize("family", TINY)
def test_counts_equal_the_processors(family: str) -> None:
    tiny = build(family)
    name, image = TINY[family]
    config = dict(preset(name).config)
    pinpoints = getattr(tiny.model.config, "image_grid_pinpoints", None)
    if pinpoints:
        config["image_grid_pinpoints"] = pinpoints
    if image["kind"] == "smart":
        bounds = tiny.processor.image_processor.size
        image = image | {"min_pixels": bounds["shortest_edge"], "max_pixels": bounds["longest_edge"]}
    known = replace(preset(name), image=image, config=config)
    token = tiny.model.config.image_token_id
    for width, height in ((40, 40), (64, 30), (33, 90), (120, 47), (61, 64)):
        ids = tiny.inputs([["a", ("image", picture(width, height)), "b"]])["input_ids"]
        assert known.count((height, width)).placeholders == int((ids == token).sum()), (width, height)


def test_frames_of_a_clip_as_the_processor_counts_them() -> None:
    tiny = build("llava_onevision")
    name, image = TINY["llava_onevision"]
    known = replace(preset(name), image=image)
    ids = tiny.inputs([["a", ("video", clip(4, 40, 40)), "b"]])["input_ids"]
    assert known.count((40, 40), 4).placeholders == int((ids == tiny.model.config.video_token_id).sum())


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-vl-72b", "internvl3-78b", "qwen3-vl-8b")]


@pytest.mark.parametrize("name", ["smolvlm-256m", "llava-next-7b", *LARGE])
def test_flops_on_the_meta_device(name: str) -> None:
    known = preset(name)
    model = build_meta(known)
    visual = known.count(known.default_size)
    stages, shape, tokens = find_stages(model), known.decoder, 64 + visual.placeholders
    prefill = formulas.exact_prefill(shape, tokens)
    assert language_flops(stages.language, stages.head, tokens) == (prefill, formulas.exact_decode(shape, tokens))
    assert 0 < formulas.exact_prefill(shape, 64 + visual.tokens // 10) < 0.2 * prefill


def test_vision_flops_of_clip_by_hand_and_of_clips_of_frames() -> None:
    known = preset("llava-1.5-7b")
    vision, projector = vision_calls(build_meta(known), known, (480, 640))
    n, d, m = 577, 1024, 4096
    assert vision == 2 * 576 * d * 3 * 14 * 14 + 24 * (2 * n * (4 * d * d + 2 * d * m) + 4 * n * n * d)
    assert projector == 2 * 576 * (1024 * 4096 + 4096 * 4096)


@pytest.mark.parametrize("name", ["llava-onevision-0.5b", "qwen3-vl-4b", "qwen2.5-vl-3b"])
def test_vision_flops_of_clips_grow_with_their_frames(name: str) -> None:
    known = preset(name)
    model = build_meta(known)
    two, six = (vision_calls(model, known, (112, 112), frames)[0] for frames in (2, 6))
    assert six == pytest.approx(3 * two, rel=0.01)


def test_a_schedule_per_layer_costs_what_its_layers_cost() -> None:
    known = preset("llava-1.5-7b")
    shape = known.decoder
    fastv = formulas.exact_prefill(shape, [640] * 2 + [352] * 30)
    by_hand = (
        2 * formulas.exact_layer(shape, 640) + 30 * formulas.exact_layer(shape, 352) + 2 * shape.width * shape.vocab
    )
    assert fastv == by_hand


def test_random_weights_answer_with_as_many_tokens_as_asked() -> None:
    known = preset("smolvlm-256m")
    small = dict(known.config)
    small["text_config"] = small["text_config"] | {"num_hidden_layers": 1}
    small["vision_config"] = small["vision_config"] | {"num_hidden_layers": 1}
    model = build_random(replace(known, config=small), "cpu", torch.float32)
    ids = torch.randint(0, 1000, (1, 5))
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    assert out.shape == (1, 11)
    again = build_random(replace(known, config=small), "cpu", torch.float32)
    assert torch.equal(next(again.parameters()), next(model.parameters()))
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="no CUDA"):
            build_random(known, "cuda")
