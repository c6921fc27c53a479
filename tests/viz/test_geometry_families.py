"""Processor, layout and geometry of every family agree: light in a token's rectangle changes that token's features
most."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tokprune
from tokprune.methods.connector.uniform import Uniform
from tokprune.testing import TinyVLM, build
from tokprune.tokens import Selection, VisualTokens
from tokprune.viz import geometry as geo
from tokprune.viz.geometry import rectangles

# Not fast_vlm: its tiny convolutional tower spreads light over the whole picture.
FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
    "gemma3",
    "mistral3",
    "ovis2",
    "molmo2",
    "minicpmv4_6",
    "perception_lm",
    "aya_vision",
    "cohere2_vision",
    "glm4v",
    "paligemma",
)


def seen_by(tiny: TinyVLM, image: np.ndarray) -> VisualTokens:
    """The stream that a method sees of a picture or a clip."""
    caught: list[VisualTokens] = []

    class Watching(Uniform):
        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            caught.append(tokens)
            return super().select(tokens, keep)

    with tokprune.apply(tiny.model, method=Watching(), ratio=0.5, processor=tiny.processor), torch.no_grad():
        part = ("image", Image.fromarray(image)) if image.ndim == 3 else ("video", image)
        tiny.model(**tiny.inputs([["a", part, "b"]]))
    return caught[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_at_a_rectangle_is_the_one_that_sees_it(family: str) -> None:
    """Through processor, tower, projector, merge and shuffle: light in a rectangle changes that token's features
    most."""
    tiny = build(family)
    width, height = 90, 60
    rng = np.random.default_rng(0)
    image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    before = seen_by(tiny, image)
    layout = before.layout
    where = geo.of_processor(tiny.processor, (height, width), None, layout)
    boxes = rectangles(where, layout)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    parts = [layout.group != 0, layout.group == 0] if where.overview else [layout.group >= 0]
    for part in parts:
        # Unpadding also cuts tokens that see a strip of the picture beside the padding.
        assert area[part].sum() / (width * height) == pytest.approx(2 / 3 if family == "llava" else 1.0, abs=0.1)
        inside = torch.nonzero(part & (area > 0.9 * area[part].max())).flatten()
        for pick in inside[:: max(1, len(inside) // 3)].tolist():
            painted = image.copy()
            left, top = boxes[pick, :2].ceil().int().tolist()  # whole pixels inside
            right, bottom = boxes[pick, 2:].floor().int().tolist()
            painted[top:bottom, left:right] = 255
            change = (seen_by(tiny, painted).features - before.features).norm(dim=1)
            best = torch.where(part, change, 0.0).argmax()
            assert best == pick, f"light at {boxes[pick].tolist()} reached token {int(best)}, not {pick}"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "internvl"])
def test_light_in_a_frame_reaches_its_token(family: str) -> None:
    tiny = build(family)
    frames = np.random.default_rng(0).integers(0, 60, (4, 48, 64, 3), dtype=np.uint8)
    before = seen_by(tiny, frames)
    where = geo.of_processor(tiny.processor, (48, 64), None, before.layout)
    boxes = rectangles(where, before.layout)
    assert before.layout.kind == "video"
    per = 4 // before.layout.num_groups
    for pick in (len(boxes) // 5, len(boxes) // 2, len(boxes) - 3):
        left, top, right, bottom = boxes[pick].round().int().tolist()
        frame = int(before.layout.group[pick])
        painted = frames.copy()
        painted[frame * per : (frame + 1) * per, top:bottom, left:right] = 255
        change = (seen_by(tiny, painted).features - before.features).norm(dim=1)
        assert int(change.argmax()) == pick
