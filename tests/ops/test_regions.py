"""Parts of a thumbnail and the tiles that show them."""

from __future__ import annotations

import pytest
import torch

from tests.methods.streams import LAYOUTS
from tokprune.errors import OptionError
from tokprune.ops.regions import region_of, region_sums
from tokprune.tokens import Layout


def test_regions_tile_the_thumbnail() -> None:
    layout = Layout.grid(6, 6)
    region = region_of(layout.row, layout.col, (6, 6), (2, 3)).reshape(6, 6)
    assert region.tolist() == [[0, 0, 1, 1, 2, 2]] * 3 + [[3, 3, 4, 4, 5, 5]] * 3


def test_uneven_grids_are_split_as_evenly_as_they_can() -> None:
    layout = Layout.grid(5, 5)
    region = region_of(layout.row, layout.col, (5, 5), (2, 1))
    assert torch.bincount(region).tolist() == [15, 10]


def test_sums_read_the_thumbnail_alone() -> None:
    layout = LAYOUTS["unpadded"]
    values = torch.ones(64)
    values[16:] = 100
    assert region_sums(values, layout).tolist() == [4.0] * 4


def test_streams_without_thumbnail_or_canvas_are_refused() -> None:
    for layout in (LAYOUTS["image"], LAYOUTS["video"], Layout.grid(2, 2, 4, "tiles", canvas=(2, 2), thumbnail=True)):
        with pytest.raises(OptionError, match="canvas"):
            region_sums(torch.ones(layout.group.shape[0]), layout)
