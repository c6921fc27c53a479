"""Videos for the tests of frames methods: even and uneven ones, with scores, a question and timestamps."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.methods.connector.clips import uneven
from tests.methods.streams import WIDTH, question
from tokprune.tokens import Layout, Query, VisualTokens

PIECES = ("what", "colour", "is", "the", "car")


def video(
    frames: int = 6, grid: tuple[int, int] = (4, 5), seed: int = 0, scores: torch.Tensor | None = None
) -> VisualTokens:
    """Random features; the question's five words are known."""
    g = torch.Generator().manual_seed(seed)
    layout = Layout.grid(*grid, frames, "video", timestamps=tuple(0.5 * t for t in range(frames)))
    features = torch.randn(frames * grid[0] * grid[1], WIDTH, generator=g)
    scores = torch.rand(frames, generator=g) if scores is None else scores
    return VisualTokens(features, layout, {"frame_scores": scores}, replace(question(), pieces=PIECES))


def ragged(seed: int = 3) -> VisualTokens:
    """Frames of four sizes, some with holes."""
    tokens = uneven([(4, 5), (2, 3), (1, 1), (5, 2), (3, 3)], holes=7, width=WIDTH, seed=seed)
    g = torch.Generator().manual_seed(seed)
    frames = tokens.layout.num_groups
    layout = replace(tokens.layout, timestamps=tuple(float(t) for t in range(frames)))
    return replace(tokens, layout=layout, signals={"frame_scores": torch.rand(frames, generator=g)}, query=question())


def about(words: torch.Tensor, pieces: tuple[str, ...] | None = None) -> Query:
    """A question of these words."""
    return Query("?", words, None, pieces=pieces)
