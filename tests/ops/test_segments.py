"""Scenes of a video: cuts, refined clusters, runs."""

from __future__ import annotations

import torch

from tests.methods.connector.clips import clip
from tokprune.ops.segments import frame_clusters, numbers, refine, runs, similar_runs, static_runs


def test_numbers_and_runs_undo_each_other() -> None:
    assert numbers([2, 1, 3]).tolist() == [0, 0, 1, 2, 2, 2]
    assert runs(numbers([2, 1, 3]).tolist()) == [2, 1, 3]


def test_cuts_are_the_union_of_lowest_and_below_the_threshold() -> None:
    frames = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.3], [0, 1], [0.1, 1], [1, 0]])
    assert similar_runs(frames, 0, 0.9) == [3, 2, 1]
    assert similar_runs(frames, 1, -1.0) == [5, 1]
    assert similar_runs(frames, 3, 0.9) == [2, 1, 2, 1]
    assert similar_runs(frames, 99, 0.9) == [1] * 6
    assert similar_runs(frames[:1], 7, 0.9) == [1]


def test_clusters_of_frames_find_scenes() -> None:
    frames = clip(12, scenes=3, moving=0.0).mean(1)
    labels = frame_clusters(frames, 3)
    assert runs(labels.tolist()) == [4, 4, 4]
    assert frame_clusters(frames[:1], 1).tolist() == [0]


def test_refine_without_a_run_is_one_scene() -> None:
    assert refine([0, 1, 2, 3]) == [0, 0, 0, 0]
    assert refine([5]) == [0]
    assert refine([1, 1, 2, 0, 0, 0]) == [1, 1, 0, 0, 0, 0]


def test_static_runs_of_extremes() -> None:
    assert static_runs(torch.zeros(0, 4, dtype=torch.bool)) == ([1], 0)
    assert static_runs(torch.ones(6, 4, dtype=torch.bool)) == ([7], 24)
    assert static_runs(torch.zeros(3, 4, dtype=torch.bool)) == ([1, 1, 1, 1], 0)
    assert static_runs(torch.ones(6, 4, dtype=torch.bool), longest=3)[1] == 2 * 8
