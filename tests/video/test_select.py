"""Choosing frames before the encoder."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tokprune.errors import OptionError
from tokprune.methods.frames.aks import AKS
from tokprune.methods.frames.quota import Quota
from tokprune.registry import get_method, list_methods
from tokprune.video.select import SELECTORS, frames_by_time, select_frames


def known(n: int, seed: int = 0) -> dict[str, object]:
    g = np.random.default_rng(seed)
    return {"scores": g.random(n), "features": g.normal(size=(n, 8)), "timestamps": (np.arange(n) * 0.5).tolist()}


def test_every_frames_method_can_be_asked() -> None:
    assert set(SELECTORS) == set(list_methods("frames"))


@pytest.mark.parametrize("name", SELECTORS)
def test_exactly_as_many_as_asked(name: str) -> None:
    for n in (1, 2, 7, 50):
        for count in range(1, n + 1):
            for data in (known(n), {**known(n), "scores": np.zeros(n), "features": np.ones((n, 3))}):
                found = select_frames(name, count, **data)  # type: ignore[arg-type]
                assert len(found) == count
                assert sorted(set(found)) == found
                assert 0 <= found[0] <= found[-1] < n
                assert all(type(i) is int for i in found)


@pytest.mark.parametrize("name", SELECTORS)
def test_ten_hours_at_one_frame_a_second_take_no_time(name: str) -> None:
    data, start = known(36_000), time.process_time()
    assert len(select_frames(name, 128, **data)) == 128  # type: ignore[arg-type]
    assert time.process_time() - start < 3


@pytest.mark.parametrize("name", SELECTORS)
def test_linear_in_the_length(name: str) -> None:
    """Twenty times the frames may not cost four hundred times the work."""

    def seconds(n: int) -> float:
        data, best = known(n), float("inf")
        for _ in range(3):
            start = time.process_time()
            select_frames(name, 64, **data)  # type: ignore[arg-type]
            best = min(best, time.process_time() - start)
        return best

    assert seconds(60_000) < 100 * max(seconds(3_000), 2e-4)


def test_what_they_choose() -> None:
    scores = torch.tensor([0.1, 0.9, 0.2, float("nan"), 0.8, 0.7])
    assert select_frames("quota", 3, scores=scores) == [1, 4, 5]
    assert select_frames("uniform_frames", 2, total=8) == [2, 6]
    assert select_frames("uniform_frames", 2, total=8, rule="linspace") == [0, 7]
    assert select_frames("fps_frames", 2, timestamps=[0, 1, 2, 3], fps=0.5) == [0, 2]
    assert select_frames("fps_frames", 3, timestamps=[0, 1, 2, 3], fps=0.5) == [0, 2, 3]
    assert select_frames("fps_frames", 1, timestamps=[0, 1, 2, 3], fps=1) == [2]
    shots = torch.eye(3).repeat_interleave(torch.tensor([6, 2, 2]), 0)
    assert select_frames("scenetilling", 3, features=shots, boundaries=2) == [3, 7, 9]


def test_a_method_object_brings_its_settings() -> None:
    scores = np.random.default_rng(1).random(100)
    by_name = select_frames("aks", 8, scores=scores, threshold=0.1, depth=2)
    assert select_frames(AKS(threshold=0.1, depth=2), 8, scores=scores) == by_name
    assert select_frames(AKS(), 8, scores=scores, threshold=0.1, depth=2) == by_name
    assert select_frames(AKS(compat="published"), 16, scores=scores) == []
    assert select_frames(Quota(score="clip", reducer="tome"), 4, scores=scores) == sorted(
        np.argsort(-scores)[:4].tolist()
    )
    assert len(select_frames(get_method("wfs_sb", balance=0.2), 4, scores=scores)) == 4


def test_errors_say_what_is_missing() -> None:
    with pytest.raises(OptionError, match="Did you mean 'aks'"):
        select_frames("ask", 3, total=9)
    with pytest.raises(OptionError, match="needs scores="):
        select_frames("aks", 3, total=9)
    with pytest.raises(OptionError, match="needs features="):
        select_frames("scenetilling", 3, total=9)
    with pytest.raises(OptionError, match="number of frames is known"):
        select_frames("uniform_frames", 3)
    with pytest.raises(OptionError, match=r"9 by scores, 8 by total"):
        select_frames("aks", 3, scores=np.ones(9), total=8)
    with pytest.raises(OptionError, match="1 to 9"):
        select_frames("uniform_frames", 10, total=9)
    with pytest.raises(OptionError, match="Did you mean 'depth'"):
        select_frames("aks", 3, scores=np.ones(9), dept=2)
    with pytest.raises(OptionError, match="one vector per frame"):
        select_frames("scenetilling", 3, features=np.ones(9))
    with pytest.raises(OptionError, match="NaN"):
        select_frames("scenetilling", 3, features=np.full((9, 2), np.nan))
    with pytest.raises(OptionError, match="ascending seconds"):
        select_frames("fps_frames", 1, timestamps=[1.0, 0.5])
    with pytest.raises(OptionError, match="a name, such as 'aks'"):
        select_frames(3, 3, total=9)
    assert frames_by_time([3.0], 1.0) == [0]
