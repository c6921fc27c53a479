"""What flows: layouts and their parts, merge weights, selections."""

from __future__ import annotations

import pytest
import torch

from tests.methods.streams import LAYOUTS, stream
from tokprune.errors import MissingQueryError, MissingSignalError
from tokprune.tokens import Layout, Merge, Query, Selection, VisualTokens


def test_grid_layout_is_raster_order_group_by_group() -> None:
    layout = Layout.grid(2, 3, groups=2, kind="video", timestamps=(0.0, 0.5))
    assert layout.group.tolist() == [0] * 6 + [1] * 6
    assert layout.row.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert layout.col.tolist() == [0, 1, 2] * 4
    assert layout.grids == ((2, 3), (2, 3))
    assert layout.timestamps == (0.0, 0.5)
    assert layout.num_groups == 2


def test_group_sizes_and_slices_follow_holes() -> None:
    layout = LAYOUTS["unpadded"]
    assert layout.group_sizes == (16, 12, 12, 12, 12)
    assert layout.group_slices() == [slice(0, 16), slice(16, 28), slice(28, 40), slice(40, 52), slice(52, 64)]
    moved = layout.to("cpu")
    assert moved.group_sizes == layout.group_sizes
    assert torch.equal(moved.row, layout.row)


@pytest.mark.parametrize("where", [slice(12, 36), torch.arange(12, 36)])
def test_part_is_a_stream_of_its_own(where: slice | torch.Tensor) -> None:
    tokens = stream(LAYOUTS["video"], ("cls_attention", "frame_scores", "keys:3"))
    part = tokens.part(where)
    assert len(part) == 24
    assert part.layout.group.tolist() == [0] * 12 + [1] * 12
    assert part.layout.num_groups == 2
    assert part.layout.group_sizes == (12, 12)
    assert part.layout.timestamps == (1.0, 2.0)
    assert torch.equal(part.signals["cls_attention"], tokens.signals["cls_attention"][12:36])
    assert torch.equal(part.signals["keys:3"], tokens.signals["keys:3"][12:36])
    assert torch.equal(part.signals["frame_scores"], tokens.signals["frame_scores"][1:3])
    assert part.query is tokens.query


def test_part_of_a_tile_is_an_image() -> None:
    tokens = stream(LAYOUTS["unpadded"])
    tile = tokens.part(tokens.layout.group_slices()[2])
    assert tile.layout.kind == "image"
    assert tile.layout.canvas is None
    assert not tile.layout.thumbnail
    assert tile.layout.row.min() == 1  # its upper row was padding
    scattered = tokens.part(torch.tensor([0, 20, 21, 63]))
    assert scattered.layout.group.tolist() == [0, 1, 1, 2]
    assert scattered.layout.group_sizes == (1, 2, 1)
    assert scattered.layout.kind == "tiles"
    assert len(tokens.part(slice(3, 11))) == 8
    assert tokens.part(slice(14, 18)).layout.group_sizes == (2, 2)


def test_what_is_missing_is_said() -> None:
    tokens = VisualTokens(torch.zeros(2, 3), Layout.line(2), {"cls_attention": torch.zeros(2)})
    with pytest.raises(MissingSignalError, match=r"'keys:3'.*present: cls_attention"):
        tokens.signal("keys:3")
    with pytest.raises(MissingQueryError, match="query="):
        tokens.question()
    assert VisualTokens(torch.zeros(2, 3), Layout.line(2), query=Query("why?")).question().text == "why?"


def merges() -> dict[str, tuple[Merge, torch.Tensor]]:
    """The same merge in every form, and its matrix: 6 inputs, 3 outputs; input 4 flows nowhere."""
    rows = torch.tensor(
        [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0], [0, 0, 0, 0.25, 0, 0.75]],
    )
    target = torch.tensor([0, 0, 1, 2, -1, 2])
    scale = torch.tensor([0.5, 0.5, 1.0, 0.25, 9.0, 0.75])
    return {
        "target": (Merge(target=target, scale=scale), rows),
        "dense": (Merge(rows=rows), rows),
        "sparse": (Merge(rows=rows.to_sparse()), rows),
    }


@pytest.mark.parametrize("form", merges())
def test_merges_are_matrices(form: str) -> None:
    merge, rows = merges()[form]
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(merge.dense(3, 6), rows)
    out = merge.apply(x, 3)
    torch.testing.assert_close(out, rows.double() @ x)
    assert torch.autograd.gradcheck(lambda y: merge.apply(y, 3), x)


@pytest.mark.parametrize("form", merges())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merges_sum_in_float32_and_keep_the_dtype(form: str, dtype: torch.dtype) -> None:
    merge, rows = merges()[form]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = merge.apply(x, 3)
    assert out.dtype == dtype
    torch.testing.assert_close(out, (rows @ x.float()).to(dtype))


def test_a_large_half_precision_mean_does_not_overflow() -> None:
    merge = Merge(target=torch.zeros(4, dtype=torch.long), scale=torch.full((4,), 0.25))
    assert merge.apply(torch.full((4, 1), 6e4, dtype=torch.float16), 1).item() == 6e4


def test_an_empty_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="rows, or target and scale"):
        Merge().apply(torch.zeros(2, 2), 1)
    with pytest.raises(ValueError, match="rows, or target and scale"):
        Merge(target=torch.zeros(2, dtype=torch.long)).dense(1, 2)


def test_selections_apply_in_order_of_precedence() -> None:
    x = torch.randn(4, 2)
    indices = torch.tensor([1, 3])
    assert torch.equal(Selection(indices).apply(x), x[[1, 3]])
    merge = Merge(target=torch.tensor([0, 0, 1, 1]), scale=torch.full((4,), 0.5))
    torch.testing.assert_close(Selection(indices, merge).apply(x), x.reshape(2, 2, 2).mean(1))
    explicit = torch.ones(2, 2, dtype=torch.float64)
    out = Selection(indices, features=explicit).apply(x)
    assert out.dtype == x.dtype
    assert torch.equal(out, torch.ones(2, 2))
    assert len(Selection(indices)) == 2


def test_streams_side_by_side_merge_as_each_alone() -> None:
    """Whatever a neighbour drops, infinities too."""
    draw = torch.Generator().manual_seed(0)
    counts, sizes = (3, 1, 4), (7, 5, 9)
    merges = [
        Merge(torch.randint(-1, k, (n,), generator=draw), torch.rand(n, generator=draw))
        for k, n in zip(counts, sizes, strict=True)
    ]
    x = torch.randn(sum(sizes), 6, generator=draw)
    dropped = torch.cat([merge.target for merge in merges if merge.target is not None]) < 0
    assert dropped.any()
    x[dropped] = torch.inf
    together = Merge.side_by_side(list(zip(merges, counts, strict=True))).apply(x, sum(counts))
    alone = [merge.apply(part, k) for merge, part, k in zip(merges, x.split(sizes), counts, strict=True)]
    assert together.isfinite().all()
    assert torch.equal(together, torch.cat(alone))
