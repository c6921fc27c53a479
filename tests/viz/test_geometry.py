"""Painted patches, the real processors, and the claimed rectangles: the light must arrive in exactly the claimed
cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from tokprune.errors import OptionError
from tokprune.tokens import Layout
from tokprune.viz import geometry as geo
from tokprune.viz.geometry import Geometry, rectangles

PINPOINTS = [[64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]
SQUARE = {"height": 64, "width": 64}


def clip(**more: Any) -> Any:
    return hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE, resample=2, **more)


def tiles_of(name: str, features: Any) -> torch.Tensor:
    """(tiles, H, W) brightness of all views that a processor made of one image, the thumbnail first as layouts
    count."""
    pixels = torch.as_tensor(np.asarray(features["pixel_values"])).float()
    views = pixels.reshape(-1, *pixels.shape[-3:]).mean(1)
    last = name.startswith(("internvl", "smolvlm"))
    return views.roll(1, 0) if last else views


def unpatchify(features: Any, patch: int) -> torch.Tensor:
    """(1, H, W) brightness from Qwen's flat patches, undoing the 2 x 2 order."""
    t, h, w = features["image_grid_thw"][0].tolist()
    assert t == 1
    flat = torch.as_tensor(features["pixel_values"]).float()
    x = flat.reshape(h // 2, w // 2, 2, 2, -1, patch, patch).mean(4)  # (H/2, W/2, 2, 2, p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(1, h * patch, w * patch)


PLAIN: dict[str, Any] = {"do_normalize": False, "return_tensors": "pt"}
QWEN = {"shortest_edge": 32 * 32, "longest_edge": 192 * 192}
GOT: dict[str, Any] = {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 6, "resample": 2}
SPLIT: dict[str, Any] = {"size": {"longest_edge": 192}, "max_image_size": {"longest_edge": 64}, "resample": 2}
SCAN: dict[str, Any] = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 64,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
LLAVA_PAD: dict[str, Any] = {
    "size": {"shortest_edge": 64},
    "crop_size": SQUARE,
    "do_pad": True,
    "image_mean": [0.0] * 3,
    "resample": 2,
}

# name -> processor, pixels per token along a side (patch times merge factor), pixels per patch
CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "clip resize and crop": (clip, 8, 8),
    "clip, crop larger than the edge": (
        lambda: hf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE, resample=2),
        8,
        8,
    ),
    "siglip stretch": (lambda: hf.SiglipImageProcessor(size=SQUARE, resample=2), 8, 8),
    "siglip, patches that do not divide": (lambda: hf.SiglipImageProcessor(size=SQUARE, resample=2), 9, 9),
    "llava pad to square": (lambda: hf.LlavaImageProcessor(**LLAVA_PAD), 8, 8),
    "llava_next tiles": (
        lambda: hf.LlavaNextImageProcessor(
            size={"shortest_edge": 64}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, resample=2
        ),
        8,
        8,
    ),
    "onevision tiles": (
        lambda: hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS, resample=2),
        8,
        8,
    ),
    "qwen smart resize, 2x2 merge": (
        lambda: hf.Qwen2VLImageProcessor(size=QWEN, patch_size=8, merge_size=2, temporal_patch_size=2, resample=2),
        16,
        8,
    ),
    "internvl tiles, pixel shuffle": (lambda: hf.GotOcr2ImageProcessor(**GOT), 16, 8),
    "smolvlm tiles, pixel shuffle": (lambda: hf.SmolVLMImageProcessor(**SPLIT), 16, 8),
    "gemma3 stretch": (lambda: hf.Gemma3ImageProcessor(size=SQUARE, resample=2), 8, 8),
    "gemma3 pan and scan": (lambda: hf.Gemma3ImageProcessor(size=SQUARE, resample=2, **SCAN), 8, 8),
}
SIZES = [(480, 640), (640, 480), (512, 512), (300, 900), (700, 251)]


def full_layout(views: torch.Tensor, token: int) -> Layout:
    tiles, height, width = views.shape
    return Layout.grid(height // token, width // token, tiles, "tiles" if tiles > 1 else "image")


def light(views: torch.Tensor, layout: Layout, token: int) -> torch.Tensor:
    """(N,) mean brightness of the middle half of every token's cell."""
    tiles, rows, cols = views.shape[0], *layout.grids[0]
    cells = views[:, : rows * token, : cols * token].reshape(tiles, rows, token, cols, token)
    q = token // 4
    return cells[:, :, q : token - q, :, q : token - q].mean((2, 4)).reshape(-1)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", CASES)
def test_painted_patches_arrive_in_the_claimed_cells(name: str, size: tuple[int, int]) -> None:
    build, token, patch = CASES[name]
    processor = build()
    height, width = size

    def views_of(image: np.ndarray) -> torch.Tensor:
        features = processor(images=[Image.fromarray(image)], **PLAIN)
        return unpatchify(features, patch) if "image_grid_thw" in features else tiles_of(name, features)

    layout = full_layout(views_of(np.zeros((height, width, 3), np.uint8)), token)
    where = geo.of_processor(processor, size, patch)
    boxes = rectangles(where, layout)
    assert boxes.shape == (len(layout.row), 4)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    full = area.max().item()
    generator = torch.Generator().manual_seed(len(name) + height)
    inside = torch.nonzero(area > 0.95 * full).flatten()  # cells that padding cuts are dim by nature
    picks = inside[torch.randperm(len(inside), generator=generator)[:4]].tolist()
    assert picks
    for pick in picks:
        image = np.zeros((height, width, 3), np.uint8)
        left, top, right, bottom = boxes[pick].round().int().tolist()
        image[top:bottom, left:right] = 255
        seen = light(views_of(image), layout, token)
        assert seen[pick] > 0.9, f"token {pick} at {boxes[pick].tolist()} stayed dark"
        same = layout.group == layout.group[pick]
        same[pick] = False
        assert seen[same].max() < 0.1, f"token {int((seen * same).argmax())} lit up instead of {pick} alone"


@pytest.mark.parametrize("name", CASES)
def test_boxes_tile_the_picture_without_gaps(name: str) -> None:
    build, _token, patch = CASES[name]
    where = geo.of_processor(build(), (480, 640), patch)
    groups = [b for i, b in enumerate(where.boxes) if i or not where.overview]
    covered = sum(max(0.0, min(b[2], 640) - max(b[0], 0)) * max(0.0, min(b[3], 480) - max(b[1], 0)) for b in groups)
    share = covered / (480 * 640)
    expected = {"clip resize and crop": 0.75, "siglip, patches that do not divide": (63 / 64) ** 2}.get(name, 1.0)
    assert share == pytest.approx(expected, abs=0.02)


def test_tokens_in_padding_have_no_area_and_boxes_stay_inside() -> None:
    where = geo.of_processor(hf.LlavaImageProcessor(**LLAVA_PAD), (100, 200), 8)
    boxes = rectangles(where, Layout.grid(8, 8))
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).reshape(8, 8)
    assert (area[0] == 0).all()
    assert (area[3] > 0).all()
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 200
    assert boxes[:, 3].max() <= 100


def test_frames_share_a_box() -> None:
    boxes = rectangles(geo.whole((90, 160)), Layout.grid(2, 4, groups=3, kind="video"))
    assert torch.equal(boxes[:8], boxes[16:])
    tiled = geo.of_processor(CASES["llava_next tiles"][0](), (90, 160), 8)
    with pytest.raises(OptionError, match="boxes"):
        rectangles(tiled, Layout.grid(2, 2, 9, "tiles"))


def test_a_shrunk_canvas_leaves_no_gaps() -> None:
    full = Layout.grid(4, 4, 5, "tiles", canvas=(2, 2), thumbnail=True)
    y, x = full.group.sub(1) // 2 * 4 + full.row, full.group.sub(1) % 2 * 4 + full.col
    stay = (full.group == 0) | (
        torch.isin(y, torch.tensor([0, 1, 3, 5, 6])) & torch.isin(x, torch.tensor([0, 2, 3, 5, 7]))
    )
    shrunk = Layout(full.group[stay], full.row[stay], full.col[stay], full.grids, "tiles", (2, 2), True)
    boxes = rectangles(geo.of_layout((80, 80), shrunk), shrunk)
    assert boxes[16:, 2].max() == 80
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))[16:]
    assert area.sum() == 80 * 70  # the last row, 7, is missing at the end: padding, not a gap
    assert len(area) == 25


def test_an_unknown_processor_says_what_to_write() -> None:
    with pytest.raises(OptionError, match="Geometry by hand"):
        geo.of_processor(object(), (10, 10))


def test_geometry_by_hand() -> None:
    where = Geometry((10, 20), ((0, 0, 20, 10),))
    assert rectangles(where, Layout.grid(1, 2)).tolist() == [[0, 0, 10, 10], [10, 0, 20, 10]]


@pytest.mark.parametrize("size", [(97, 211), (1200, 1600), (33, 40), (5, 7)], ids=str)
def test_a_trace_is_within_a_fraction_of_a_pixel(size: tuple[int, int]) -> None:
    """A shorter side of 64 and a centre crop of 64: the box follows by arithmetic."""
    box = geo.of_processor(clip(), size, 8).boxes[0]
    height, width = size
    short = min(size)
    resized = (64, int(64 * width / height)) if height <= width else (int(64 * height / width), 64)
    top, left = int((resized[0] - 64) / 2), int((resized[1] - 64) / 2)
    expected = (
        left * width / resized[1],
        top * height / resized[0],
        (left + 64) * width / resized[1],
        (top + 64) * height / resized[0],
    )
    assert box == pytest.approx(expected, abs=max(0.2, 0.004 * short))


def test_a_processor_that_makes_something_else_leaves_it_to_the_layout() -> None:
    """Packed or shuffled pixels have the shape of a picture and are none."""

    class Shuffled:
        def __call__(self, images: Any, **more: Any) -> dict[str, Any]:
            pixels = torch.tensor(np.asarray(images[0])).permute(2, 0, 1)[None].float()
            return {"pixel_values": pixels.unflatten(3, (-1, 4)).flip(3).flatten(3)[..., ::2]}

    layout = Layout.grid(2, 2)
    assert geo.of_processor(Shuffled(), (64, 64), 8, layout) == geo.whole((64, 64))
    with pytest.raises(OptionError, match="Geometry by hand"):
        geo.of_processor(Shuffled(), (64, 64), 8)
