"""Pieces of a grid, regions of a thumbnail, groups of equal size as one batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.streams import LAYOUTS
from tokprune.budget import share
from tokprune.errors import OptionError
from tokprune.ops.grid import centres, even_cells, even_runs, middles, region_of, region_sums, stacks
from tokprune.tokens import Layout


def test_cells_of_flat_and_of_tall_pictures_lie_along_them() -> None:
    halves = even_cells(Layout.grid(2, 12), [2]).view(2, 12)
    assert halves[:, :6].eq(0).all()
    assert halves[:, 6:].eq(1).all()
    assert (
        even_cells(Layout.grid(12, 2), [3]).view(12, 2).unique(dim=1).flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    )


def test_a_cut_inside_a_column_gives_its_upper_rows_to_the_left_cell() -> None:
    assert even_cells(Layout.grid(3, 3), [2]).view(3, 3).tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 1]]


def test_cells_are_squares_of_the_box_that_the_tokens_fill() -> None:
    full = Layout.grid(8, 3)
    for stay in (full.col < 2, full.col > 0):  # 8 x 2 tokens of an 8 x 3 grid
        box = Layout(full.group[stay], full.row[stay], full.col[stay], full.grids, "image")
        assert even_cells(box, [4]).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_groups_that_share_everything_share_a_call() -> None:
    found = stacks([2, 3, 2, 3, 0, 3], [1, 2, 1, 1, 0, 2], "cpu")
    assert [(s.where.tolist(), s.keep) for s in found] == [
        ([[0, 1], [5, 6]], 1),
        ([[2, 3, 4], [10, 11, 12]], 2),
        ([[7, 8, 9]], 1),
    ]


def test_groups_without_a_budget_are_left_out() -> None:
    assert [s.where.tolist() for s in stacks([2, 2], [0, 2], "cpu")] == [[[2, 3]]]


def test_labels_keep_groups_apart() -> None:
    found = stacks([4, 4, 4], [2, 2, 2], "cpu", [(2, 2), (1, 4), (2, 2)])
    assert [(s.where[:, 0].tolist(), s.label) for s in found] == [([0, 8], (2, 2)), ([4], (1, 4))]


def test_regions_tile_the_thumbnail() -> None:
    layout = Layout.grid(6, 6)
    region = region_of(layout.row, layout.col, (6, 6), (2, 3)).reshape(6, 6)
    assert region.tolist() == [[0, 0, 1, 1, 2, 2]] * 3 + [[3, 3, 4, 4, 5, 5]] * 3
    wide = Layout.grid(4, 6)  # each side is divided by its own length
    region = region_of(wide.row, wide.col, (4, 6), (2, 3)).reshape(4, 6)
    assert region.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_uneven_grids_are_split_as_evenly_as_they_can() -> None:
    layout = Layout.grid(5, 5)
    region = region_of(layout.row, layout.col, (5, 5), (2, 1))
    assert torch.bincount(region).tolist() == [15, 10]


def test_sums_read_the_thumbnail_alone() -> None:
    layout = LAYOUTS["unpadded"]
    values = torch.ones(64)
    values[16:] = 100
    assert region_sums(values, layout).tolist() == [4.0] * 4


def test_sums_of_a_thumbnail_that_the_canvas_does_not_divide() -> None:
    """3 x 5 tokens over 2 x 2 tiles: two rows and three columns belong to the first ones."""
    layout = Layout(
        torch.tensor([0] * 15 + [1, 2, 3, 4]),
        torch.cat([torch.arange(15) // 5, torch.zeros(4).long()]),
        torch.cat([torch.arange(15) % 5, torch.zeros(4).long()]),
        ((3, 5), *[(1, 1)] * 4),
        "tiles",
        canvas=(2, 2),
        thumbnail=True,
    )
    values = torch.cat([torch.arange(15), torch.full((4,), 100)])
    expected = [0 + 1 + 2 + 5 + 6 + 7, 3 + 4 + 8 + 9, 10 + 11 + 12, 13 + 14]
    for kind, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = region_sums(values.to(kind), layout)
        assert found.dtype == wide
        assert found.tolist() == expected


def test_streams_without_thumbnail_or_canvas_are_refused() -> None:
    for layout in (LAYOUTS["image"], LAYOUTS["video"], Layout.grid(2, 2, 4, "tiles", canvas=(2, 2), thumbnail=True)):
        with pytest.raises(OptionError, match="canvas"):
            region_sums(torch.ones(layout.group.shape[0]), layout)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_pieces_are_exact_and_even_for_every_grid_and_hole(height: int, width: int, data: st.DataObject) -> None:
    full = Layout.grid(height, width, 2, "tiles")
    stay = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(full.group), max_size=len(full.group))))
    stay[0] = stay[-1] = True  # each group has a token
    layout = Layout(full.group[stay], full.row[stay], full.col[stay], full.grids, "tiles")
    sizes = layout.group_sizes
    keep = data.draw(st.integers(1, sum(sizes)))
    budgets = share(keep, sizes, sizes)
    for cell in (even_cells(layout, budgets), even_runs(layout, budgets)):
        used = cell >= 0
        assert torch.equal(used, torch.tensor(budgets)[layout.group] > 0)
        assert cell[used].unique().tolist() == list(range(keep))
        for group in range(2):
            own = torch.bincount(cell[(layout.group == group) & used], minlength=keep)
            own = own[own > 0]
            assert len(own) == budgets[group]
            assert budgets[group] == 0 or int(own.max() - own.min()) <= 1
    cell = even_cells(layout, budgets)
    assert torch.equal(cell[centres(cell, keep, layout)], torch.arange(keep))


@pytest.mark.parametrize(
    ("grid", "keep", "size"), [((24, 24), 64, (3, 3)), ((24, 24), 144, (2, 2)), ((8, 16), 8, (4, 4))]
)
def test_cells_are_squares_where_grid_and_budget_divide(
    grid: tuple[int, int], keep: int, size: tuple[int, int]
) -> None:
    layout = Layout.grid(*grid)
    cell = even_cells(layout, [keep])
    for index in range(keep):
        own = cell == index
        assert int(layout.row[own].max() - layout.row[own].min()) + 1 == size[0]
        assert int(layout.col[own].max() - layout.col[own].min()) + 1 == size[1]


@pytest.mark.parametrize("keep", [5, 29, 58, 115, 333])
def test_cells_stay_compact_where_they_do_not(keep: int) -> None:
    layout = Layout.grid(24, 24)
    cell = even_cells(layout, [keep])
    side = (576 / keep) ** 0.5
    for index in range(keep):
        own = cell == index
        assert int(layout.row[own].max() - layout.row[own].min()) + 1 <= 2 * side + 1
        assert int(layout.col[own].max() - layout.col[own].min()) + 1 <= 2 * side + 1


def test_runs_of_a_line_and_their_middles() -> None:
    cell = even_runs(Layout.line(10), [4])
    assert cell.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert middles(cell, 4).tolist() == [1, 3, 6, 8]


def test_groups_without_a_budget_have_no_cell() -> None:
    cell = even_runs(LAYOUTS["video"], [2, 0, 1, 0, 0])
    assert cell[:12].tolist() == [0] * 6 + [1] * 6
    assert cell[12:24].tolist() == [-1] * 12
    assert cell[24:36].tolist() == [2] * 12
    assert middles(cell, 3).tolist() == [2, 8, 29]
