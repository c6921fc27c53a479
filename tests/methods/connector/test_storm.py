"""STORM's sampling and pooling: operators, and the exact budget made of them."""

from __future__ import annotations

import pytest
import torch

from tests.methods.connector.clips import clip, video
from tokprune.errors import OptionError
from tokprune.methods.connector.storm import Storm
from tokprune.tokens import Layout, VisualTokens


def temporal_pool(features: torch.Tensor, stride: int) -> torch.Tensor:
    """Mean of every `stride` frames; a shorter rest is averaged over what there is. (T, N, C) -> (ceil(T / stride), N,
    C)."""
    return torch.stack([part.mean(0) for part in features.split(stride)])


def spatial_pool(features: torch.Tensor, grid: tuple[int, int], size: int) -> torch.Tensor:
    """Mean of every size x size cells of the grid. (T, H W, C) -> (T, H W / size², C)."""
    height, width = grid
    cells = features.unflatten(1, (height // size, size, width // size, size))
    return cells.mean((2, 4)).flatten(1, 2)


def test_sampling_is_every_other_frame() -> None:
    features = clip(8)
    chosen = Storm().select(video(features, (6, 6)), 4 * 36)
    torch.testing.assert_close(chosen.apply(features.flatten(0, 1)), features[::2].flatten(0, 1))


def test_pooling_is_the_mean_over_time_and_cells() -> None:
    features = clip(8)
    tokens = video(features, (6, 6))
    chosen = Storm(stride=4, mode="pool").select(tokens, 2 * 36)
    torch.testing.assert_close(chosen.apply(tokens.features), temporal_pool(features, 4).flatten(0, 1))
    chosen = Storm(stride=2, mode="pool").select(tokens, 4 * 36)
    torch.testing.assert_close(chosen.apply(tokens.features), temporal_pool(features, 2).flatten(0, 1))
    chosen = Storm(stride=4, mode="pool").select(tokens, 2 * 9)
    expected = spatial_pool(temporal_pool(features, 4), (6, 6), 2).flatten(0, 1)
    torch.testing.assert_close(chosen.apply(tokens.features), expected)


def test_a_budget_that_the_sampled_frames_cannot_hold_lowers_the_stride() -> None:
    tokens = video(clip(9), (6, 6))
    frames = tokens.layout.group[Storm(stride=4).select(tokens, 200).indices].unique()
    assert frames.tolist() == list(range(9))  # stride 3 holds 108, stride 2 holds 180
    frames = tokens.layout.group[Storm(stride=4).select(tokens, 150).indices].unique()
    assert frames.tolist() == [0, 2, 4, 6, 8]


def test_few_tokens_come_from_the_whole_video() -> None:
    tokens = video(clip(32), (6, 6))
    frames = tokens.layout.group[Storm().select(tokens, 4).indices]
    assert frames.diff().tolist() == [8, 8, 8]


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="stride"):
        Storm(stride=0)
    with pytest.raises(OptionError, match="mode"):
        Storm(mode="average")  # type: ignore[arg-type]


@pytest.mark.parametrize("widths", [(3, 2), (2, 3)])
def test_frames_of_different_sizes_are_averaged_where_both_have_a_token(widths: tuple[int, int]) -> None:
    places = [(t, r, c) for t, width in enumerate(widths) for r in range(2) for c in range(width)]
    group, row, col = torch.tensor(places).T
    layout = Layout(group, row, col, tuple((2, w) for w in widths), "video")
    features = torch.randn(len(places), 4)
    chosen = Storm(stride=2, mode="pool").select(VisualTokens(features, layout), 2 * widths[0])
    at = dict(zip(places, features, strict=True))
    expected = [
        torch.stack([at[t, r, c] for t in (0, 1) if (t, r, c) in at]).mean(0)
        for r in range(2)
        for c in range(widths[0])
    ]
    torch.testing.assert_close(chosen.apply(features), torch.stack(expected))
