"""Merge maps, read back pixel by pixel: colours follow the groups through what the processor did to the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokprune
from tests.viz.cuts import cropped, padded, stretched, tiled
from tokprune.errors import OptionError
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build
from tokprune.tokens import Layout
from tokprune.viz import geometry as geo
from tokprune.viz import style
from tokprune.viz.merge_map import draw_merge_map, map_layout, stream_maps, tower_order

COLOURS = style.distinct(400).astype(int)


def painted(where: geo.Geometry, grid: tuple[int, int]) -> Image.Image:
    """A picture whose cells, as the geometry of one box lays them, have a colour each."""
    pixels = np.full((*where.size, 3), 240, np.uint8)
    for n, box in enumerate(geo.rectangles(where, Layout.grid(*grid)).round().int().tolist()):
        left, top, right, bottom = box
        pixels[top:bottom, left:right] = COLOURS[n]
    return Image.fromarray(pixels)


def centres(where: geo.Geometry, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    boxes = geo.rectangles(where, Layout.grid(*grid))
    return ((boxes[:, 0] + boxes[:, 2]) / 2).long().numpy(), ((boxes[:, 1] + boxes[:, 3]) / 2).long().numpy()


@pytest.mark.parametrize(
    "where",
    [
        cropped((240, 400)),
        padded((200, 320)),
        stretched((300, 180)),
        geo.whole((192, 192)),
    ],
    ids=["crop", "pad", "stretch", "whole"],
)
def test_cells_of_a_group_have_its_mean_colour_where_the_processor_put_them(where: geo.Geometry) -> None:
    grid = (6, 6)
    picture = painted(where, grid)
    groups = torch.arange(36).view(grid)
    groups[0, 0] = groups[2, 2] = groups[2, 3] = 21  # far cells join, too
    groups[4, 1] = -1
    drawn = np.asarray(draw_merge_map(picture, groups, where, longest=max(where.size)), dtype=int)
    assert drawn.shape[:2] == where.size
    x, y = centres(where, grid)
    area = np.array([(b[2] - b[0]) * (b[3] - b[1]) for b in geo.rectangles(where, Layout.grid(*grid)).tolist()])
    flat = groups.flatten().numpy()
    for n in range(36):
        if area[n] < 100:  # in the padding: nothing of it is seen
            continue
        got = drawn[y[n], x[n]]
        if flat[n] < 0:
            assert got.mean() < 0.6 * COLOURS[n].mean()
            continue
        members = np.flatnonzero(flat == flat[n])
        expected = (COLOURS[members] * area[members, None]).sum(0) / area[members].sum()
        assert np.abs(got - expected).max() <= 4, (n, got, expected)


def test_outlines_run_between_groups_and_nowhere_inside() -> None:
    where = geo.whole((160, 160))
    groups = torch.tensor([[0, 0], [0, 1]])
    drawn = np.asarray(draw_merge_map(Image.new("RGB", (160, 160), (90, 120, 60)), groups, where, longest=160), int)
    plain = np.array([90, 120, 60])
    on_edge = np.abs(drawn - plain).max(-1) > 8
    assert on_edge[80:, 78:82].any(1).all()  # between the lower cells
    assert on_edge[78:82, 80:].any(0).all()
    assert not on_edge[:70].any()  # one group above, and no line between its cells
    assert not on_edge[90:, :70].any()
    assert on_edge.mean() < 0.05


def test_what_was_cropped_away_is_pale() -> None:
    where = cropped((240, 400))
    picture = Image.new("RGB", (400, 240), (60, 60, 60))
    drawn = np.asarray(draw_merge_map(picture, torch.zeros(6, 6, dtype=torch.long), where, longest=400), int)
    assert (drawn[:, :70].mean((0, 1)) > 180).all()
    assert np.abs(drawn[100:140, 150:250] - 60).max() <= 2


def test_tiles_and_thumbnail_are_two_views_with_groups_of_their_own() -> None:
    where = tiled((240, 320), (2, 2))
    assert where.overview
    assert len(where.boxes) == 5
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8))
    maps = [torch.zeros(3, 3, dtype=torch.long) for _ in where.boxes]
    drawn = np.asarray(draw_merge_map(picture, maps, where, longest=320), int)
    assert drawn.shape[1] == 2 * 320 + 12
    source = np.asarray(picture, float)
    assert np.abs(drawn[60, 80] - source[:120, :160].mean((0, 1))).max() < 6  # its own tile alone
    assert np.abs(drawn[60, 332 + 80] - source.mean((0, 1))).max() < 6
    layout, labels = map_layout(maps, True)
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert layout.thumbnail


def test_mistakes_are_named() -> None:
    picture = Image.new("RGB", (40, 30))
    with pytest.raises(OptionError, match="merge_map"):
        draw_merge_map(picture, torch.zeros(4, dtype=torch.long))
    with pytest.raises(OptionError, match="20 x 20"):
        draw_merge_map(picture, torch.zeros(2, 2, dtype=torch.long), geo.whole((20, 20)))
    with pytest.raises(OptionError, match="2 merge maps"):
        draw_merge_map(picture, [torch.zeros(2, 2, dtype=torch.long)] * 2)


@torch.no_grad()
def test_a_timm_tower_draws_what_it_joined() -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5
    ).eval()
    where = stretched((64, 64))
    picture = painted(where, (4, 4))
    pixels = torch.from_numpy(np.asarray(picture.resize((32, 32)), np.float32) / 255).permute(2, 0, 1)[None]
    with tokprune.apply(model, "tome", r=3) as pruning:
        model(pixels)
    maps = stream_maps(pruning.trace)
    drawn = np.asarray(draw_merge_map(picture, maps, where, longest=64), int)
    x, y = centres(where, (4, 4))
    flat = maps[0].flatten().numpy()
    assert 1 < len(np.unique(flat)) < 16
    for n in range(16):
        expected = COLOURS[:16][flat == flat[n]].mean(0)
        assert np.abs(drawn[y[n], x[n]] - expected).max() <= 2


def quarters() -> Image.Image:
    """A picture whose parts differ in colour, whatever tiles it is cut into."""
    x, y = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_each_box_gets_the_map_of_the_tower_picture_that_shows_it(family: str) -> None:
    tiny = build(family)
    inputs = tiny.inputs([["a ", ("image", quarters()), "?"]])
    with tokprune.apply(tiny.model, "tome", ratio=0.5, processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        stream, trace = pruning.last.streams[0], pruning.encoder.trace
    where = geo.of_processor(tiny.processor, (64, 96), None, stream.layout)
    maps = stream_maps(trace, stream)
    assert len(maps) == len(where.fit(stream.layout).boxes)
    assert draw_merge_map(quarters(), maps, where).width >= 640
    order = tower_order(stream.layout, stream.columns, stream.candidates)
    if family == "llava_next":  # tiles are padded, so their mean colour says little; whole picture first, then raster
        assert order == list(range(len(where.boxes)))
    if len(order) == 1 or family == "llava_next":
        return
    assert sorted(order) == list(range(len(order)))
    pixels = inputs["pixel_values"].flatten(0, -4)
    source = np.asarray(quarters(), float)
    parts = [[max(int(v), 0) for v in box] for box in where.boxes]
    for channel in (0, 1):  # red grows to the right, green downwards
        wanted = np.array([source[p[1] : p[3], p[0] : p[2], channel].mean() for p in parts])
        shown = np.array([pixels[number, channel].mean().item() for number in order])
        clear = wanted[:, None] > wanted[None] + 20
        assert clear.any()
        assert (shown[:, None] > shown[None])[clear].all()


@torch.no_grad()
def test_the_command_draws_maps_for_methods_inside_the_tower(tmp_path: Any) -> None:
    from typer.testing import CliRunner

    from tokprune.cli.app import app

    scene = "docs/images/scene.png"
    arguments = ["show", "--image", scene, "--ratio", "0.5", "--methods"]
    results = {}
    for name, more in {"map": ["tome,divprune"], "kept": ["tome,divprune", "--kept"]}.items():
        out = tmp_path / f"{name}.png"
        result = CliRunner().invoke(app, [*arguments, *more, "-o", str(out)])
        assert result.exception is None, result.output
        results[name] = np.asarray(Image.open(out))
    assert results["map"].shape[1] > 1000
    assert results["map"].shape != results["kept"].shape or not np.array_equal(results["map"], results["kept"])
    result = CliRunner().invoke(app, [*arguments, "divprune", "--merge-map", "-o", str(tmp_path / "no.png")])
    assert isinstance(result.exception, OptionError)
    assert "--methods tome" in str(result.exception)


@torch.no_grad()
def test_a_bare_tower_inside_a_vlm_draws_too() -> None:
    tiny = build("llava")
    with apply_encoder(tiny.model, "evit") as pruning:
        tiny.model(**tiny.inputs([["a ", ("image", quarters()), "?"]]))
    assert draw_merge_map(quarters(), stream_maps(pruning.trace)).size == (640, 427)
