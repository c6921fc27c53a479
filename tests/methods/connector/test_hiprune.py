"""HiPrune against the published masks, and neighbours that stay inside the picture."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.connector.hiprune import HiPrune, hiprune
from tokprune.methods.options import Compat
from tokprune.tokens import Layout, VisualTokens


@claims("hiprune", anchor="object_attn_colmean")
def test_golden(case: GoldenCase) -> None:
    objects, deep = case["object_attn_colmean"][:, 1:], case["deep_attn_colmean"][:, 1:]
    expected, side = case["kept_sorted"], case.number("grid")
    alpha = round(case.number("alpha"), 6)  # stored as float32
    tiles, n = objects.shape
    keep = int(case.number("total_budget") / tiles)
    chosen = hiprune(objects, deep, keep, alpha, (side, side), compat="published")
    assert torch.equal(chosen, expected)
    assert torch.equal(torch.zeros_like(case["mask"]).scatter(1, chosen, 1), case["mask"])
    method = HiPrune(alpha=alpha, compat="published")
    signals = dict(zip(method.needs, (objects.flatten(), deep.flatten()), strict=True))
    layout = Layout.grid(side, side, groups=tiles, kind="tiles" if tiles > 1 else "image")
    selection = method.select(VisualTokens(torch.zeros(tiles * n, 2), layout, signals), tiles * keep)
    assert torch.equal(selection.indices, (expected + torch.arange(tiles)[:, None] * n).flatten())


def one_anchor(at: int, compat: Compat) -> list[int]:
    """Five of a 6 x 8 grid, where one anchor with its neighbours takes the whole budget and the deep layer likes the
    end."""
    objects = torch.zeros(1, 48)
    objects[0, at] = 1.0
    return hiprune(objects, torch.linspace(0, 1, 48)[None], 5, 1.0, (6, 8), compat=compat)[0].tolist()


def test_neighbours_do_not_wrap_into_other_rows() -> None:
    assert one_anchor(20, "published") == one_anchor(20, "corrected") == [12, 19, 20, 21, 28]
    assert one_anchor(23, "published") == [15, 22, 23, 24, 31]  # 23 ends row 2, 24 begins row 3
    assert one_anchor(23, "corrected") == [15, 22, 23, 31, 47]


def test_neighbours_outside_do_not_bring_the_corners_in() -> None:
    assert one_anchor(3, "published") == [0, 2, 3, 4, 11]  # above row 0: clamped to token 0
    assert one_anchor(3, "corrected") == [2, 3, 4, 11, 47]
    assert one_anchor(44, "published") == [
        36,
        43,
        44,
        45,
        47,
    ]  # the end gets in by the clamp, here also by the deep layer


def test_holes_of_an_unpadded_tile_are_no_neighbours() -> None:
    """The first two rows of a 4 x 4 grid are cut away; the anchor stands in what is now the first row."""
    cell = torch.arange(8, 16)
    layout = Layout(torch.zeros(8, dtype=torch.long), cell // 4, cell % 4, ((4, 4),))
    method = HiPrune(alpha=1.0)
    objects, deep = torch.zeros(8), torch.linspace(0, 1, 8)
    objects[1] = 1.0
    tokens = VisualTokens(torch.zeros(8, 2), layout, dict(zip(method.needs, (objects, deep), strict=True)))
    assert method.select(tokens, 5).indices.tolist() == [0, 1, 2, 5, 7]


def test_anchors_go_before_their_neighbours() -> None:
    objects = torch.zeros(1, 25)
    objects[0, 12] = 1.0
    deep = torch.zeros(1, 25)
    deep[0, 17] = 1.0
    assert hiprune(objects, deep, 3, 1.0, (5, 5))[0].tolist() == [7, 12, 17]


def test_layers_are_options() -> None:
    assert HiPrune().needs == ("received_attention:0.348", "received_attention:-2")
    assert HiPrune(object_layer="15", deep_layer="31").needs == ("received_attention:15", "received_attention:31")
    assert round(0.348 * 23) == 8
