"""The reducers of single frames: exact numbers, the operators they stand for, frames with holes."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.connector.clips import uneven
from tests.methods.frames.clips import video
from tokprune.errors import BudgetError, OptionError
from tokprune.methods.frames.reduce import FrameReducer, Mode, as_rows, line_lengths, rectangles, resize
from tokprune.tokens import VisualTokens

every_mode = pytest.mark.parametrize("mode", get_args(Mode))


def frame(grid: tuple[int, int], seed: int = 0) -> VisualTokens:
    return video(1, grid, seed)


@every_mode
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (4, 4), (5, 3)])
def test_every_number_is_met(mode: str, published: bool, grid: tuple[int, int]) -> None:
    tokens = frame(grid)
    n = len(tokens)
    for keep in range(1, n + 1):
        chosen = FrameReducer(mode, published).select(tokens, keep)  # type: ignore[arg-type]
        assert chosen.indices.shape == (keep,)
        assert (chosen.indices.diff() > 0).all()
        assert int(chosen.indices[-1]) < n
        if chosen.weights is not None:
            dense = chosen.weights.dense(keep, n)
            assert (dense >= 0).all()
            torch.testing.assert_close(dense.sum(1), torch.ones(keep))
            if mode.startswith("tome"):
                assert ((dense != 0).sum(0) == 1).all()  # each token goes to one place
    assert torch.equal(chosen.apply(tokens.features), tokens.features)  # keep == n


@pytest.mark.parametrize("shape", [(2, 2), (4, 3), (3, 4), (7, 5), (1, 1)])
def test_rectangles_are_the_operators(shape: tuple[int, int]) -> None:
    grid = (7, 5) if shape != (3, 4) else (5, 7)
    tokens = frame(grid)
    picture = tokens.features.T.reshape(1, -1, *grid)
    count = shape[0] * shape[1]
    assert line_lengths(grid, count) == [shape[1]] * shape[0]
    resized = F.interpolate(picture, size=shape, mode="bilinear", align_corners=False)
    pooled = F.adaptive_avg_pool2d(picture, shape)
    for mode, expected in (("bilinear", resized), ("avgpool", pooled)):
        found = FrameReducer(mode).select(tokens, count).apply(tokens.features)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected[0].flatten(1).T, atol=1e-5, rtol=1e-5)


def test_rectangles_are_at_most_twice_as_slim_or_flat() -> None:
    assert rectangles(2, 2) == ((1, 1), (2, 1), (2, 2))  # the taller of two equals
    assert rectangles(1, 3) == ((1, 2), (1, 3))
    assert rectangles(3, 1) == ((2, 1), (3, 1))


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_resizing_any_grid_to_any_number(height: int, width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, height * width))
    lengths = line_lengths((height, width), count)
    assert sum(lengths) == count
    assert len(lengths) <= height
    assert max(lengths) <= width
    assert max(lengths) - min(lengths) <= 1
    # Straight ramps tell whether outputs lie where they should: within their row, from left to right.
    col = torch.arange(width).repeat(height).float()
    for mode in ("bilinear", "avgpool"):
        found = resize((height, width), count, mode)
        assert (found.slots.diff() > 0).all()
        across = torch.sparse.mm(as_rows(found, height * width, col.device), col[:, None])[:, 0]
        start = 0
        for length in lengths:
            row = across[start : start + length]
            assert (row.diff() > 0).all()
            torch.testing.assert_close(row.mean(), torch.tensor((width - 1) / 2), atol=1e-4, rtol=1e-4)
            start += length


@every_mode
def test_holes(mode: str) -> None:
    tokens = uneven([(4, 5)], holes=6)
    for keep in range(1, len(tokens) + 1):
        chosen = FrameReducer(mode).select(tokens, keep)  # type: ignore[arg-type]
        assert chosen.indices.shape == (keep,)
        assert (chosen.indices.diff() > 0).all()
        assert torch.isfinite(chosen.apply(tokens.features)).all()


@every_mode
def test_a_batch_is_its_frames(mode: str) -> None:
    method = FrameReducer(mode)  # type: ignore[arg-type]
    batch = [frame((4, 4), s) for s in range(3)] + [frame((5, 3)), uneven([(4, 4)], holes=2)]
    keeps = [6, 6, 7, 6, 6]
    for tokens, keep, together in zip(batch, keeps, method.select_batch(batch, keeps), strict=True):
        alone = method.select(tokens, keep)
        assert torch.equal(alone.indices, together.indices)
        torch.testing.assert_close(alone.apply(tokens.features), together.apply(tokens.features))


@every_mode
def test_gradients_reach_the_tokens(mode: str) -> None:
    tokens = frame((4, 4))
    features = tokens.features.clone().requires_grad_()
    chosen = FrameReducer(mode).select(VisualTokens(features, tokens.layout), 6)  # type: ignore[arg-type]
    chosen.apply(features).sum().backward()
    assert features.grad is not None
    assert (features.grad[chosen.indices] != 0).any(1).all()


def test_what_it_refuses() -> None:
    with pytest.raises(OptionError, match="bilinear"):
        FrameReducer("bilinea")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one frame at a time"):
        FrameReducer().select(video(2, (3, 3)), 4)
    with pytest.raises(BudgetError):
        FrameReducer().select(frame((3, 3)), 10)
