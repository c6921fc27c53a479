"""The pixels stage behind what processors and connectors do to pictures: padding, resampling, normalising otherwise."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import tokprune
from tests.adapters.reference import slow_unless
from tests.methods.pixels.loops import drawn
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.testing import build


@torch.no_grad()
def test_a_picture_that_is_resampled_stays_whole_or_is_refused() -> None:
    """LLaVA-OneVision resamples large pictures, by weights that add up to 1 but for rounding."""
    tiny = build("llava_onevision")
    tiny.processor.vision_aspect_ratio = tiny.model.config.vision_aspect_ratio = "anyres_max_2"
    noise, repeating = Image.effect_noise((64, 64), 120).convert("RGB"), drawn(64, 64)
    inputs = tiny.inputs([["a ", ("image", noise), " b"]])
    assert 64 < int((inputs["input_ids"] == tiny.model.config.image_token_id).sum()) < 64 + 256, "not resampled"
    plain = tiny.model(**inputs).logits
    for amount in ({}, {"ratio": 1.0}):
        with tokprune.apply(tiny.model, "pixelprune", **amount):
            assert torch.equal(tiny.model(**inputs).logits, plain)
    with tokprune.apply(tiny.model, "pixelprune", ratio=0.3), pytest.raises(UnsupportedModelError, match="resamples"):
        tiny.model(**tiny.inputs([["a ", ("image", repeating), " b"]]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", slow_unless(False, "llava_onevision")])
@pytest.mark.parametrize("name", ["pixelprune", "blank"])
def test_the_padding_of_a_tile_stands_for_nothing(family: str, name: str) -> None:
    """A picture as black as the padding beside it: each tile with a part of it keeps one of its own units."""
    tiny = build(family)
    with tokprune.apply(tiny.model, name) as pruning:
        tiny.model(**tiny.inputs([["a ", ("image", Image.new("RGB", (60, 24))), " b"]]))
        stream = pruning.last.streams[0]
        groups = stream.geometry.layout.group
        assert len(groups.unique()) > 1, "one tile"
        assert groups[stream.indices].unique().tolist() == groups.unique().tolist()


@torch.no_grad()
@pytest.mark.parametrize("way", ["by 127.5", "not normalised", "levels to 255"])
def test_black_and_white_are_the_processors(way: str) -> None:
    """Two greys 0.1 apart, by processors that rescale to 2, do not normalise, or normalise what is not rescaled."""
    tiny = build("qwen2_5_vl")
    image = tiny.processor.image_processor
    if way == "by 127.5":
        image.rescale_factor = 1 / 127.5
    elif way == "not normalised":
        image.do_normalize = False
    else:
        image.do_rescale, image.image_mean, image.image_std = False, [120.0] * 3, [60.0] * 3
    two = Image.new("RGB", (64, 64), (100, 100, 100))
    two.paste((126, 126, 126), (32, 0, 64, 64))
    inputs = tiny.inputs([["a ", ("image", two), " b"]])
    for threshold, count in ((0.09, 2), (0.11, 1)):
        with tokprune.apply(tiny.model, "pixelprune", threshold=threshold, processor=tiny.processor) as pruning:
            tiny.model(**inputs)
            assert pruning.last.streams[0].kept == count
    image.do_rescale = image.do_normalize = False
    with pytest.raises(OptionError, match="std="):
        tokprune.apply(tiny.model, "pixelprune", threshold=0.1, processor=tiny.processor)
