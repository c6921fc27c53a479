"""What all spatio-temporal methods promise on videos: exact counts for every budget, odd frames, linear cost in their
number."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.methods.connector.clips import clip, uneven, video
from tokprune.methods.base import ConnectorMethod
from tokprune.registry import get_method
from tokprune.tokens import Layout, VisualTokens

METHODS = [
    "auroracap_frames",
    "dycoke",
    "evs",
    "fastvid",
    "flashvid",
    "framefusion",
    "holitom",
    "prunevid",
    "storm",
    "vidcom2",
]
every_method = pytest.mark.parametrize("name", METHODS)


def method(name: str) -> ConnectorMethod:
    built = get_method(name)
    assert isinstance(built, ConnectorMethod)
    return built


def check(name: str, tokens: VisualTokens, keep: int) -> None:
    selection = method(name).select(tokens, keep)
    indices = selection.indices
    assert indices.shape == (keep,)
    assert (indices.diff() > 0).all()
    assert int(indices[0]) >= 0
    assert int(indices[-1]) < len(tokens)
    if selection.weights is not None:
        rows = selection.weights.dense(keep, len(tokens))
        torch.testing.assert_close(rows.sum(-1), torch.ones(keep), atol=1e-4, rtol=1e-4)
        assert (rows >= 0).all()
        assert (rows[torch.arange(keep), indices] > 0).all(), "a slot's own token is part of it"


@every_method
def test_every_budget_is_met_exactly(name: str) -> None:
    tokens = video(clip(8, (2, 3)), (2, 3))
    for keep in range(1, 49):
        check(name, tokens, keep)


@every_method
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_any_number_of_frames(name: str, frames: int) -> None:
    tokens = video(clip(frames, (2, 3), scenes=min(2, frames)), (2, 3))
    for keep in {1, 2, 3 * frames, 6 * frames - 1, 6 * frames}:
        check(name, tokens, keep)


@every_method
def test_frames_of_different_sizes(name: str) -> None:
    for tokens in (uneven([(3, 4), (2, 4), (3, 4), (3, 2), (3, 4)]), uneven([(3, 3)] * 9, holes=11)):
        for keep in (1, 3, 11, 30, len(tokens) - 1, len(tokens)):
            check(name, tokens, keep)


@every_method
@pytest.mark.parametrize("moving", [0.0, 1.1])
def test_still_and_restless_videos(name: str, moving: float) -> None:
    tokens = video(clip(12, (3, 3), scenes=1, moving=moving), (3, 3))
    for keep in (1, 9, 40, 107):
        check(name, tokens, keep)
    same = dataclasses.replace(tokens, features=tokens.features[:9].repeat(12, 1))
    for keep in (1, 9, 40, 107):
        check(name, same, keep)


@every_method
def test_half_precision_chooses_as_float32_does_on_the_same_values(name: str) -> None:
    half = video(clip(8, (3, 3)).bfloat16(), (3, 3))
    full = dataclasses.replace(half, features=half.features.float())
    a, b = method(name).select(half, 20), method(name).select(full, 20)
    assert torch.equal(a.indices, b.indices)
    assert a.apply(half.features).dtype == torch.bfloat16


@every_method
def test_tiles_are_not_taken_for_frames(name: str) -> None:
    """Groups that do not follow one another in time: equal tiles are no reason to drop or merge one of them."""
    features = clip(1, (4, 4), scenes=1).repeat(3, 1, 1)
    layout = Layout.grid(4, 4, 3, "tiles", canvas=(1, 2), thumbnail=True)
    attention = (torch.arange(48) % 16).float() / 500
    tokens = VisualTokens(features.flatten(0, 1), layout, {"cls_attention": attention})
    for keep in (3, 24, 48):
        check(name, tokens, keep)
    groups = torch.bincount(layout.group[method(name).select(tokens, 24).indices], minlength=3)
    assert groups.tolist() == [8, 8, 8]


class Meter(TorchDispatchMode):
    """Counts the elements that operators write, and the most that one of them does."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                count = tensor._nnz() if tensor.is_sparse else tensor.numel()
                self.total += count
                self.largest = max(self.largest, count)
        return out


@every_method
@pytest.mark.parametrize("scenes", [1, 16])
def test_work_and_memory_grow_linearly_with_the_frames(name: str, scenes: int) -> None:
    """Four times the frames write about four times the elements, and no tensor grows faster than the video itself.

    Anything quadratic would write sixteen times as many; a matrix of all pairs of tokens of the long video would have
    (192 * 16)² = 9.4 million elements, the video has 73 728. Half of the leeway is for FastVID, whose cost per frame
    grows with the scene until that is cut into pieces.
    """
    seen = []
    for frames in (48, 192):
        tokens = video(clip(frames, (4, 4), 24, scenes=scenes, moving=0.2), (4, 4))
        with Meter() as meter:
            selection = method(name).select(tokens, frames * 16 // 10)
        assert len(selection) == frames * 16 // 10
        seen.append((meter.total, meter.largest, tokens.features.numel()))
    (little, _, _), (much, largest, size) = seen
    assert much < 8 * little
    assert largest <= 2 * size
