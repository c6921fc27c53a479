"""Layouts against the models themselves: what a layout says about a token must be what the encoder did with the
picture."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.adapters.encoded import VIDEO, encode, media, prompts, tiny
from tokprune.adapters.families import FAMILIES as LISTED
from tokprune.adapters.families import (
    PlaceholderRun,
    StreamLayout,
    arrange,
    placeholder_runs,
    stream_layouts,
)
from tokprune.adapters.families.geometry import canvas_from_pixels, canvas_from_shape, scaled_grid
from tokprune.adapters.towers import tower_of
from tokprune.testing import FAMILIES, TinyVLM, picture

CASES = [(family, "image") for family in FAMILIES] + [(family, "video") for family in VIDEO]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_streams_partition_the_rows(family: str, kind: str) -> None:
    pictures = media(family, kind)
    encoded = encode(tiny(family), prompts(pictures, kind))
    streams = encoded.layouts()
    assert sum(s.total for s in streams) == encoded.features.shape[0] == sum(r.length for r in encoded.runs)
    assert len(streams) == len(pictures)
    for stream in streams:
        lay, n = stream.layout, len(stream.rows)
        assert stream.note == ""
        assert torch.equal(torch.cat([stream.rows, stream.separators]).sort().values, torch.arange(stream.total))
        assert len(lay.group) == len(lay.row) == len(lay.col) == len(stream.line) == n
        assert len(stream.separators) == len(stream.separator_line)
        assert (lay.kind == "video") == (kind == "video")
        assert (lay.kind == "tiles") == (lay.num_groups > 1 and kind == "image") == lay.thumbnail
        assert sum(lay.group_sizes) == n
        grids = torch.tensor(lay.grids)[lay.group]
        assert ((lay.row >= 0) & (lay.row < grids[:, 0]) & (lay.col >= 0) & (lay.col < grids[:, 1])).all()
        place = (lay.group * 1000 + lay.row) * 1000 + lay.col
        assert (place.diff() > 0).all()  # groups ascend, raster inside, no token twice
        if lay.canvas is not None:
            assert lay.canvas[0] * lay.canvas[1] + 1 == lay.num_groups
        assert set(stream.separator_line.tolist()) <= set(stream.line.tolist())


def silence(tower: nn.Module) -> None:
    """Let attention add nothing: every patch is then encoded from its own pixels alone."""
    for module in tower.modules():
        if any(isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "q_proj")):
            for name in ("out_proj", "o_proj", "proj", "projection_layer"):
                out = getattr(module, name, None)
                if isinstance(out, nn.Linear):
                    nn.init.zeros_(out.weight)
                    if out.bias is not None:
                        nn.init.zeros_(out.bias)


def painted(content: Any, v: float, u: float) -> Any:
    """The picture with a square around (v, u), shares of its height and width, inverted."""
    pixels = np.array(content)
    h, w = pixels.shape[-3:-1]
    half = max(0.06 * min(h, w), 2.0)
    box = (slice(round(v * h - half), round(v * h + half)), slice(round(u * w - half), round(u * w + half)))
    pixels[(..., *box, slice(None))] = 255 - pixels[(..., *box, slice(None))]
    return Image.fromarray(pixels) if pixels.ndim == 3 else pixels


def centre(weight: Tensor, at: Tensor, size: float) -> float:
    """Where on an axis of `size` cells the changed tokens lie, as a share."""
    weight = weight * (weight > 0.25 * weight.max())
    return float((weight * (at + 0.5)).sum() / weight.sum() / size)


def spots(stream: StreamLayout, change: Tensor) -> list[tuple[float, float, float, float]]:
    """(v, u, cell height, cell width) of the change in the thumbnail, if any, and in the canvas or grid."""
    lay, out = stream.layout, []
    views = [lay.group == 0, lay.group > 0] if lay.thumbnail else [torch.ones_like(lay.group, dtype=torch.bool)]
    for view in views:
        group, row, col = lay.group[view], lay.row[view], lay.col[view]
        if lay.thumbnail and bool((group > 0).any()):
            assert lay.canvas is not None
            h, w = lay.grids[1]
            row = row + (group - 1) // lay.canvas[1] * h
            col = col + (group - 1) % lay.canvas[1] * w
        row, col = row - row.min(), col - col.min()  # unpadding leaves the picture's part of the canvas
        height, width = int(row.max()) + 1, int(col.max()) + 1
        found = change[view]
        out.append((centre(found, row, height), centre(found, col, width), 1 / height, 1 / width))
    return out


@functools.cache
def silenced(family: str) -> TinyVLM:
    vlm = replace(tiny(family), model=copy.deepcopy(tiny(family).model))
    silence(tower_of(vlm.model.base_model))
    return vlm


@pytest.mark.parametrize("place", [(0.28, 0.2), (0.6, 0.8)])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "fast_vlm"])
def test_a_painted_spot_changes_the_token_the_layout_names(family: str, place: tuple[float, float]) -> None:
    """Features and signals both: the token that changes lies where the picture changed, in thumbnail and tiles
    alike."""
    vlm = silenced(family)
    crops = family in ("llava", "vipllava")  # their processors cut the middle out
    before = [picture(64, 64, 1)] if crops else media(family, "image")
    after = [painted(content, *place) for content in before]
    clean, dirty = (encode(vlm, prompts(p, "image"), ("keys:0", "encoder_features")) for p in (before, after))
    start = 0
    for stream in clean.layouts():
        rows = start + stream.rows
        start += stream.total
        pairs = [(clean.features, dirty.features)]
        pairs += [(clean.signals.values[name], dirty.signals.values[name]) for name in clean.signals.values]
        for one, two in pairs:
            change = (one[rows] - two[rows]).flatten(1).abs().sum(1)
            assert float(change.max()) > 0
            for v, u, height, width in spots(stream, change):
                assert v == pytest.approx(place[0], abs=0.75 * height + 0.03)
                assert u == pytest.approx(place[1], abs=0.75 * width + 0.03)


@pytest.mark.parametrize("family", VIDEO)
def test_a_painted_frame_changes_the_frame_the_layout_names(family: str) -> None:
    vlm, place, frame = silenced(family), (0.28, 0.75), 3
    before = media(family, "video")
    after = [content.copy() for content in before]
    for content in after:
        content[frame] = painted(content[frame], *place)
    clean, dirty = (encode(vlm, prompts(p, "video"), ("keys:0",)) for p in (before, after))
    start = 0
    for stream in clean.layouts():
        rows = start + stream.rows
        start += stream.total
        lay = stream.layout
        for one, two in (
            (clean.features, dirty.features),
            (clean.signals.values["keys:0"], dirty.signals.values["keys:0"]),
        ):
            change = (one[rows] - two[rows]).flatten(1).abs().sum(1)
            per_frame = torch.zeros(lay.num_groups).index_add(0, lay.group, change)
            assert int(per_frame.argmax()) == frame * lay.num_groups // 4
            assert float(per_frame.sort().values[:-1].sum()) < 1e-3 * float(per_frame.max())
            h, w = lay.grids[0]
            assert centre(change, lay.row, h) == pytest.approx(place[0], abs=0.75 / h + 0.03)
            assert centre(change, lay.col, w) == pytest.approx(place[1], abs=0.75 / w + 0.03)


class Strange:
    """A base model of an unlisted type."""

    def __init__(self, **vision: Any) -> None:
        self.config = SimpleNamespace(model_type="strange_vlm", vision_config=SimpleNamespace(**vision))


def strange(n: int, pixels: Tensor | None, items: int = 2, **kwargs: Any) -> list[StreamLayout]:
    given = {} if pixels is None else {"pixel_values": pixels}
    output = SimpleNamespace(pooler_output=torch.zeros(items, n, 3))
    return stream_layouts(Strange(), "image", given | kwargs, output)  # type: ignore[arg-type]


def test_unlisted_models_get_a_grid_or_a_line_with_a_note() -> None:
    square, wide = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 32)
    assert strange(64, square)[0].layout.grids == ((8, 8),)
    assert strange(32, wide)[1].layout.grids == ((4, 8),)
    for found in (strange(63, square), strange(64, None), strange(64, torch.zeros(3, 3, 32, 32))):
        assert [s.layout.grids for s in found] == [((1, len(s.rows)),) for s in found]
        assert all("geometry of strange_vlm unknown" in s.note for s in found)
    grid = torch.tensor([[1, 8, 16]])
    assert strange(32, None, 1, image_grid_thw=grid)[0].layout.grids == ((4, 8),)


def test_a_contradiction_ends_in_lines_not_in_wrong_places() -> None:
    encoded = encode(tiny("qwen2_vl"), prompts([picture()], "image"))
    encoded.output.pooler_output = [encoded.features[:-1]]
    (stream,) = encoded.layouts()
    assert stream.layout.grids == ((1, stream.total),)
    assert "geometry of qwen2_vl unknown" in stream.note


def test_placeholder_runs_see_what_stands_between() -> None:
    ids = torch.tensor([[0, 5, 9, 9, 6, 9, 7], [5, 9, 9, 9, 1, 1, 9]])
    assert placeholder_runs(ids, ids == 9) == [
        PlaceholderRun(2, 0, (0, 5)),
        PlaceholderRun(1, 0, (6,)),
        PlaceholderRun(3, 1, (5,)),
        PlaceholderRun(1, 1, (1, 1)),
    ]
    assert placeholder_runs(ids, ids == 3) == []


@pytest.mark.parametrize("canvas", [(1, 6), (6, 1), (2, 3), (3, 2)])
def test_the_canvas_is_read_off_the_pixels(canvas: tuple[int, int]) -> None:
    whole = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    big = nn.functional.interpolate(whole[None], (canvas[0] * 32, canvas[1] * 32), mode="bilinear")[0]
    small = nn.functional.interpolate(whole[None], (32, 32), mode="bilinear")[0]
    tiles = big.unflatten(1, (canvas[0], 32)).unflatten(3, (canvas[1], 32)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    assert canvas_from_pixels(tiles, small) == (canvas, True)


def test_an_even_picture_has_no_clear_canvas() -> None:
    shape, clear = canvas_from_pixels(torch.zeros(6, 3, 8, 8), torch.zeros(3, 8, 8))
    assert shape in ((2, 3), (3, 2))
    assert not clear


def test_shapes() -> None:
    assert canvas_from_shape(2, (4, 4), (3, 6)) == (1, 2)
    assert canvas_from_shape(2, (4, 4), (6, 3)) == (2, 1)
    assert scaled_grid((27, 27), 196) == (14, 14)  # odd sides are rounded up
    assert scaled_grid((16, 32), 128) == (8, 16)
    assert scaled_grid((16, 32), 63) is None


def test_arrange_refuses_patches_that_do_not_fit() -> None:
    encoded = encode(tiny("llava"), [["a", ("image", picture()), "b"]])
    assert arrange(encoded.call, torch.arange(64.0)).tolist() == list(range(64))
    with pytest.raises(Exception, match="values were made for 64 rows"):
        arrange(encoded.call, torch.zeros(128, 2))


def test_every_family_of_the_matrix_is_listed() -> None:
    assert set(FAMILIES) <= set(LISTED)
