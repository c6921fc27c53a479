"""Smaller pictures before the processor runs: token counts are the processor's own, budgets hold, content counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.adapters.reference import shared, slow_unless
from tokprune.errors import OptionError
from tokprune.scaling import distinct_patches, resize, scale_inputs, scaled_to, token_counter
from tokprune.testing import FAMILIES, picture

SIZED = ("qwen2_5_vl", "llava_next", "internvl")  # processors whose number of tokens depends on the picture's size


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def area(image: Image.Image) -> int:
    """A processor that makes a token of each 10 x 10 pixels."""
    return max(1, image.width // 10) * max(1, image.height // 10)


@pytest.mark.parametrize("family", [slow_unless(f in SIZED, f) for f in FAMILIES])
def test_the_count_is_that_of_the_whole_prompt(family: str) -> None:
    tiny = shared(family)
    count, pictures = token_counter(tiny.processor), [picture(60, 40, 1), picture(90, 120, 2)]
    for image in pictures:
        ids = tiny.inputs([["see ", ("image", image), " what?"]])["input_ids"]
        expected = int((ids == tiny.processor.image_token_id).sum())
        if family in ("molmo2", "ovis2"):  # their visual tokens have another id than the one that the processor tells
            assert expected == 0
            with pytest.raises(OptionError, match="count="):
                count(image)
        else:
            assert count(image) == expected > 0


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.2, 0.05])
def test_resize_comes_as_near_as_sizes_can(ratio: float) -> None:
    image = noise(400, 300)
    small = resize(image, None, ratio, count=area)
    assert (small is image) == (ratio == 1)
    assert abs(area(small) - ratio * area(image)) <= 0.03 * area(image)
    assert small.width / small.height == pytest.approx(4 / 3, rel=0.1)


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_resize_by_a_real_processor(family: str) -> None:
    processor = shared(family).processor
    count, image = token_counter(processor), picture(160, 120, 1)
    got = [count(resize(image, processor, r)) for r in (0.6, 0.3)]
    assert count(image) > got[0] > got[1]


def test_a_fixed_number_of_tokens_is_refused_with_what_to_take_instead() -> None:
    with pytest.raises(OptionError, match=r"makes 64 visual tokens of a picture of any size.*pool"):
        resize(picture(60, 40, 1), shared("llava").processor, 0.5)
    with pytest.raises(OptionError, match="the smallest gives 4"):
        scaled_to(noise(400, 300), lambda image: 4 + area(image) if image.width > 40 else 4, 2)
    with pytest.raises(OptionError, match="count="):
        token_counter(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [30, 200, 1000, 2400])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_scaled_pictures_stay_within_the_budget_and_use_it(budget: int, density: float) -> None:
    images = [noise(400, 300), noise(200, 200, 1), Image.new("RGB", (500, 200), "white")]
    scaled = scale_inputs(images, None, budget, density=density, count=area)
    total = sum(map(area, scaled))
    assert 0.8 * budget <= total <= budget
    assert all(area(new) <= area(old) for new, old in zip(scaled, images, strict=True))


def test_busy_pictures_keep_more_than_plain_ones_of_their_size() -> None:
    plain, busy = Image.new("RGB", (400, 300), "white"), noise(400, 300)
    for images in ([plain, busy], [busy, plain]):
        kept = {
            id(old): area(new) for old, new in zip(images, scale_inputs(images, None, 800, count=area), strict=True)
        }
        assert kept[id(busy)] > 2 * kept[id(plain)]
    even = scale_inputs([plain, busy], None, 800, density=0.0, count=area)
    assert abs(area(even[0]) - area(even[1])) <= 60
    assert distinct_patches(plain) == 1.0 < distinct_patches(noise(8, 8)) + 1 < distinct_patches(busy)


def test_nothing_is_scaled_up_or_touched_where_all_fits() -> None:
    images = [noise(40, 30), noise(50, 50)]
    assert all(a is b for a, b in zip(scale_inputs(images, None, 10**6, count=area), images, strict=True))
    assert scale_inputs([], None, 5, count=area) == []
    with pytest.raises(OptionError, match="does not leave a token"):
        scale_inputs(images, None, 1, count=area)
    for bad in ({"density": 2.0}, {"least": -1.0}):
        with pytest.raises(OptionError, match="not between 0 and 1"):
            scale_inputs(images, None, 5, count=area, **bad)


def test_real_prompts_get_shorter() -> None:
    tiny = shared("qwen2_5_vl")
    images: list[Any] = [picture(160, 120, 1), picture(90, 90, 2)]
    count = token_counter(tiny.processor)
    budget = sum(map(count, images)) // 2
    scaled = scale_inputs(images, tiny.processor, budget)
    ids = tiny.inputs([[("image", scaled[0]), ("image", scaled[1]), " compare"]])["input_ids"]
    assert 0 < int((ids == tiny.processor.image_token_id).sum()) <= budget
