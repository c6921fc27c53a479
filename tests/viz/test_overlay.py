"""Overlays, read back pixel by pixel, and sheets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.viz.cuts import cropped, tiled
from tokprune.errors import OptionError
from tokprune.tokens import Layout, Merge, Selection
from tokprune.viz import geometry as geo
from tokprune.viz import style
from tokprune.viz.kept import kept_on_image
from tokprune.viz.overlay import cell_map, draw_overlay, merge_targets, outline
from tokprune.viz.sheet import Panel, sheet

GREY = Image.new("RGB", (320, 240), (200, 180, 160))


def centres(picture: Image.Image, boxes: torch.Tensor, factor: float) -> np.ndarray:
    pixels = np.asarray(picture, dtype=float)
    x = ((boxes[:, 0] + boxes[:, 2]) / 2 * factor).long().numpy()
    y = ((boxes[:, 1] + boxes[:, 3]) / 2 * factor).long().numpy()
    return pixels[y, x].mean(1)


@pytest.mark.parametrize("pil", [True, False])
def test_exactly_the_kept_cells_stay_bright(pil: bool) -> None:
    layout = Layout.grid(6, 6)
    where = cropped((240, 320))
    kept = torch.tensor([0, 7, 8, 35])
    picture = draw_overlay(GREY if pil else np.asarray(GREY), layout, kept, where, longest=640)
    assert picture.size == (640, 480)
    light = centres(picture, geo.rectangles(where, layout), 2.0)
    bright = np.flatnonzero(light > 150)
    assert bright.tolist() == kept.tolist()


def test_the_cropped_sides_are_pale_and_the_rest_is_dark() -> None:
    where = cropped((240, 320))
    pixels = np.asarray(draw_overlay(GREY, Layout.grid(6, 6), torch.tensor([14]), where, longest=320), dtype=int)
    assert (pixels[:, :38].mean((0, 1)) > 200).all()
    assert (pixels[2, 60] < 110).all()


def test_tiles_give_two_views_with_their_own_tokens() -> None:
    where = tiled((240, 320), (2, 2))
    groups = len(where.boxes)
    assert where.overview
    layout = Layout.grid(3, 3, groups, "tiles", canvas=(2, 2), thumbnail=True)
    picture = draw_overlay(GREY, layout, torch.tensor([4, 9]), where, longest=320)
    by_layout = draw_overlay(GREY, layout, torch.tensor([4, 9]), longest=320)
    differs = (np.asarray(picture, int) != np.asarray(by_layout, int)).any(-1)
    assert differs.mean() < 0.02  # edges of cells may move by a pixel
    assert picture.width == 2 * 320 + 12
    boxes = geo.rectangles(where, layout)
    left, right = picture.crop((0, 0, 320, 240)), picture.crop((332, 0, 652, 240))
    assert np.flatnonzero(centres(left, boxes[9:], 1.0) > 150).tolist() == [0]
    assert np.flatnonzero(centres(right, boxes[:9], 1.0) > 150).tolist() == [4]


def test_merged_tokens_share_a_colour_and_unused_ones_fade() -> None:
    layout = Layout.grid(1, 4)
    merge = Merge(target=torch.tensor([0, 0, 1, -1]), scale=torch.tensor([0.5, 0.5, 1.0, 0.0]))
    chosen = Selection(torch.tensor([0, 2]), merge)
    picture = np.asarray(draw_overlay(GREY, layout, chosen, longest=320), dtype=float)
    colour = [picture[60, 20 + 80 * i] for i in range(4)]  # away from the white frames
    assert np.abs(colour[0] - colour[1]).max() < 2
    assert np.abs(colour[0] - colour[2]).max() > 30
    assert colour[3].mean() < 110


@pytest.mark.parametrize("sparse", [False, True])
def test_merge_targets_take_the_largest_weight(sparse: bool) -> None:
    rows = torch.tensor([[0.7, 0.2, 0.0, 0.0], [0.3, 0.8, 1.0, 0.0]])
    merge = Merge(rows=rows.to_sparse() if sparse else rows)
    assert merge_targets(Selection(torch.tensor([0, 1]), merge), 4).tolist() == [0, 1, 1, -1]
    assert merge_targets(Selection(torch.tensor([1, 3])), 4).tolist() == [-1, 0, -1, 1]


def test_cells_meet_without_gap_or_overlap() -> None:
    layout = Layout.grid(7, 5)
    boxes = geo.rectangles(geo.whole((241, 323)), layout)
    cells = cell_map(boxes, (482, 646), 2.0, torch.arange(35))
    assert cells.min() == 0
    assert len(np.unique(cells)) == 35


def test_outline_marks_both_sides() -> None:
    labels = np.zeros((4, 6), int)
    labels[:, 3:] = 1
    assert outline(labels, 1).sum(0).tolist() == [0, 0, 4, 4, 0, 0]
    assert outline(labels, 2).sum(0).tolist() == [0, 4, 4, 4, 4, 0]


def test_wrong_input_is_named() -> None:
    with pytest.raises(OptionError, match="layout has 4"):
        draw_overlay(GREY, Layout.grid(2, 2), torch.tensor([4]))
    with pytest.raises(OptionError, match="320 x 240"):
        draw_overlay(GREY, Layout.grid(2, 2), torch.tensor([0]), geo.whole((10, 10)))
    with pytest.raises(OptionError, match="at least one"):
        sheet([])


def test_sheet_is_deterministic_and_holds_every_panel() -> None:
    def page(**kept: list[int]) -> Image.Image:
        chosen = {name: Selection(torch.tensor(indices)) for name, indices in kept.items()}
        records: Any = {n: SimpleNamespace(layout=Layout.grid(4, 4), selection=s) for n, s in chosen.items()}
        untraced: Any = object()  # no processor: the layout alone says where tokens lie
        return kept_on_image(GREY, records, untraced, title="t", subtitle="s", longest=200)

    pages = [page(divprune=[0, 5], random=[1, 9]) for _ in range(2)]
    assert pages[0].tobytes() == pages[1].tobytes()
    assert pages[0].width >= 3 * 200
    assert page(divprune=[0, 6], random=[1, 9]).tobytes() != pages[0].tobytes()


def test_long_text_is_wrapped_and_cut() -> None:
    lines = style.wrap("word " * 100, 17, 300, 3)
    assert len(lines) == 3
    assert all(style.text_size(line, 17)[0] <= 300 for line in lines)
    assert lines[-1].endswith("...")
    tall = sheet([Panel(GREY, "name", "a caption that needs more room than this panel has to offer in one line")])
    assert tall.height > sheet([Panel(GREY, "name")]).height


def test_colours_are_distinct_and_the_ramp_rises() -> None:
    assert len({tuple(c) for c in style.distinct(64).tolist()}) == 64
    ramp = style.ramp(np.linspace(0, 1, 32)).astype(float) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(ramp) > 0).all()


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert style.to_rgb(clear).getpixel((1, 1)) == (255, 255, 255)
