"""How matrices of all pairs are cut up, and how many pictures one call takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokprune.ops import blocks
from tokprune.ops.blocks import Rows, row_blocks, together, whole


def test_a_matrix_is_held_up_to_8192_tokens() -> None:
    assert whole(8192, 8192)
    assert not whole(8192, 8193)
    assert whole(2**26)
    assert whole(4, 4096, 4096)  # a batch counts
    assert not whole(5, 4096, 4096)


def test_pictures_of_a_call_hold_all_their_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WHOLE", 20)
    assert [len(part) for part in together(range(9), 10)] == [4, 4, 1]
    assert [list(part) for part in together(range(3), 21)] == [[0], [1], [2]]  # one at least
    assert [len(part) for part in together(range(900), 0)] == [400, 400, 100]
    assert together([], 10) == []


def test_rows_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WHOLE", 10)
    monkeypatch.setattr(blocks, "ROWS", 4)
    assert list(row_blocks(10)) == [slice(0, 10)]
    assert list(row_blocks(11)) == [slice(0, 4), slice(4, 8), slice(8, 11)]
    assert list(row_blocks(11, 9)) == [slice(0, 11)]
    assert list(row_blocks(9, 12)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert list(row_blocks(0)) == []


def test_rows_are_made_ahead_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of a block: the pick, and what is likely to be picked next; no more than that is held."""
    monkeypatch.setattr(blocks, "ROWS", 16)
    matrix, asked = torch.arange(25.0).view(5, 5), []

    def make(which: Tensor) -> Tensor:
        asked.append(which.tolist())
        return matrix[which]

    rows, worth = Rows(make), torch.tensor([0.0, 4.0, 1.0, 3.0, 2.0])
    for pick in (0, 1, 3, 0, 2, 0):
        assert torch.equal(rows.row(torch.tensor([pick]), worth), matrix[pick])
    assert asked == [[0, 1, 3], [2, 1, 3], [0, 1, 3]]
    few = Rows(make)
    assert torch.equal(few.row(torch.tensor([4]), worth[:1]), matrix[4])  # fewer are left than fit
    there = Rows(lambda which: matrix.to("meta")[which])  # as on a GPU: that one row
    assert there.row(torch.tensor([4], device="meta"), worth).shape == (5,)
