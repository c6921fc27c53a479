"""AKS, SceneTilling and WFS-SB against the published code, and what they do that it does not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_vectors import GoldenCase, claims
from tests.methods.frames.clips import video
from tokprune.errors import OptionError
from tokprune.methods.frames.aks import AKS
from tokprune.methods.frames.scenetilling import SceneTilling
from tokprune.methods.frames.wfs_sb import WfsSb
from tokprune.ops import keyframes
from tokprune.ops.frames import depths, left_peaks, neighbour_similarity, scene_ends, scenes
from tokprune.ops.keyframes import (
    HIGH,
    LOW,
    Diverse,
    aks,
    aks_published,
    detail_band,
    detail_level,
    least_distance,
    prominent_peaks,
    relevance_boundaries,
    scene_importance,
    wfs_sb,
)
from tokprune.tokens import Layout, VisualTokens

# AKS


@claims("aks", anchor="scores")
def test_aks_golden(case: GoldenCase) -> None:
    scores, tested = case.array("scores").tolist(), 0
    for key in case:
        found = re.fullmatch(r"M(\d+)_t([\d.]+)_L(\d+)", key)
        if not found:
            continue
        count, threshold, depth = int(found[1]), float(found[2]), int(found[3])
        assert aks_published(scores, count, threshold, depth) == case.array(key).astype(int).tolist(), key
        if count <= len(scores):
            assert len(set(aks(scores, count, threshold, depth))) == count
        tested += 1
    assert tested


@pytest.mark.parametrize(("count", "threshold", "depth"), [(64, 0.8, 5), (32, 0.6, 3), (32, 0.2, 3)])
def test_aks_shares_most_frames_with_the_published_code_where_that_loses_none(
    count: int, threshold: float, depth: int
) -> None:
    for seed in range(5):
        scores = np.random.default_rng(seed).random(333).tolist()
        published = aks_published(scores, count, threshold, depth)
        assert len(published) == count
        assert len(set(aks(scores, count, threshold, depth)) & set(published)) / count > 0.6


def test_aks_published_loses_frames_and_ours_does_not() -> None:
    scores = np.random.default_rng(0).random(200)
    assert aks_published(scores, 16) == []
    assert len(aks_published(scores, 48)) == 32
    assert len(aks(scores, 16)) == 16
    assert len(aks(scores, 48)) == 48


def test_aks_takes_the_peak_where_one_part_stands_out_and_covers_where_none_does() -> None:
    peak = np.zeros(64)
    peak[20:24] = 1.0
    for rule in (aks, aks_published):
        assert rule(peak, 4, depth=1) == [20, 21, 22, 23]  # 1 - 4/64 above the mean: chosen at once
    noise = 0.5 + 0.01 * np.sin(np.arange(64))
    chosen = aks(noise, 8)
    assert all(sum(a <= f < a + 16 for f in chosen) == 2 for a in (0, 16, 32, 48))
    for constant in (0.3, 0.0):
        assert aks([constant] * 10, 3) == wfs_sb([constant] * 10, 3) == [1, 5, 8]
        with np.errstate(all="raise"):  # 0 / 0 is not left to numpy
            assert aks_published([constant] * 4, 2, depth=1) == [0, 2]


def test_aks_splits_a_part_whose_best_are_better_by_the_threshold_alone() -> None:
    for rule in (aks, aks_published):
        assert rule([0.0, 0.0, 1.0, 1.0], 2, threshold=0.5, depth=1) == [0, 2]  # 1 - 1/2 is not more than the threshold
        assert rule([0.0, 0.0, 1.0, 1.0], 2, threshold=0.49, depth=1) == [2, 3]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80), st.data())
@settings(max_examples=100, deadline=None)
def test_frames_are_exact_for_any_scores(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    for found in (
        aks(scores, count, data.draw(st.floats(0, 1)), data.draw(st.integers(0, 8))),
        wfs_sb(scores, count),
        wfs_sb(scores, count, np.random.default_rng(0).random((len(scores), 3))),
    ):
        assert len(found) == count
        assert sorted(set(found)) == found
        assert 0 <= found[0] <= found[-1] < len(scores)


def test_aks_gives_whole_frames_and_the_rest_to_the_worst() -> None:
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.1, 0.2])
    tokens = video(8, (3, 3), scores=scores)
    counts = AKS(score="self", depth=0).allocate(tokens, 22)
    assert counts == [0, 9, 0, 9, 0, 4, 0, 0]
    with pytest.raises(OptionError, match="no frame at all for 3 frames"):
        AKS(score="self", compat="published").allocate(tokens, 22)
    assert AKS(score="self", compat="published", depth=1).allocate(tokens, 20) == [0, 9, 0, 0, 0, 9, 0, 0]
    for bad in ({"depth": -1}, {"depth": 1.5}, {"threshold": "high"}, {"compat": "old"}):
        with pytest.raises(OptionError):
            AKS(**bad)


def test_aks_splits_five_times_by_default() -> None:
    """32 parts of 4 frames choose 2 each, in every part the last two; 16 or 64 parts would choose others."""
    scores = [0.0, 0.0, 0.6, 0.6, 0.7, 0.7, 1.0, 1.0] * 16
    assert aks(scores, 64) == [i for i in range(128) if i % 4 >= 2]


# SceneTilling


@claims("scenetilling", anchor="feat")
def test_scenetilling_golden(case: GoldenCase) -> None:
    similarity = neighbour_similarity(case["feat"].float())
    if "sim" in case:
        torch.testing.assert_close(similarity, case["sim"].float(), atol=1e-5, rtol=0)
    for key in case:
        if key.startswith("depth"):
            mine = depths(similarity, left_only=key == "depth_left")
            torch.testing.assert_close(mine, case[key].float(), atol=1e-5, rtol=0)
        elif key.startswith("bound"):
            left = "left" in key
            alpha = re.search(r"alpha([\d.]+)", key)
            k = re.search(r"_k(\d+)", key)
            found = scene_ends(
                depths(similarity, left),
                float(alpha[1]) if alpha else 0.5,
                boundaries=int(k[1]) if k else None,
                closed=not left,
            )
            assert found == case[key].tolist(), key


def test_scenes_end_where_the_depth_stands_out() -> None:
    depth = torch.tensor([0.0, 1.0, 5.0, 6.0])  # mean 3, standard deviation sqrt(26 / 3) = 2.94
    assert scene_ends(depth) == [2, 3, 4]  # above 3 + 0.5 * 2.94 = 4.47
    assert scene_ends(depth, most=1) == [3, 4]
    assert scene_ends(depth, alpha=1.0) == [3, 4]  # above 5.94
    assert scene_ends(depth, alpha=1.1) == [4]  # above 6.24
    assert scene_ends(torch.tensor([0.0, 1.0] * 20)) == [*range(1, 30, 2), 40]  # 15 of 20, the earlier ones


def test_left_peaks_are_what_walking_finds() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 2, 3, 50):
        values = torch.randint(0, 4, (n,), generator=g).float()
        expected = []
        for i in range(n):
            peak = i
            while peak > 0 and values[peak - 1] >= values[peak]:
                peak -= 1
            expected.append(values[peak].item())
        assert left_peaks(values).tolist() == expected


def test_scenes_are_found_and_a_still_video_is_one() -> None:
    g = torch.Generator().manual_seed(1)
    shots = torch.randn(3, 16, generator=g)
    frames = shots.repeat_interleave(torch.tensor([5, 20, 2]), 0) + 0.05 * torch.randn(27, 16, generator=g)
    assert scenes(frames, boundaries=2) == [5, 20, 2]
    assert scenes(frames, alpha=1.0) == [5, 20, 2]
    still = shots[:1].repeat(30, 1) + 1e-7 * torch.randn(30, 16, generator=g)
    assert scenes(still) == [30]
    assert scenes(still, boundaries=3) == [30]
    assert scenes(shots[:1]) == [1]
    assert scenes(shots[:2]) == [2]
    blinking = torch.eye(2).repeat_interleave(3, 0).repeat(20, 1)
    assert scenes(blinking) == [3] * 15 + [75]  # 15 cuts of 39, the earlier ones


def test_a_long_static_scene_gets_no_more_than_a_short_one() -> None:
    g = torch.Generator().manual_seed(1)
    shots = torch.randn(3, 4, 16, generator=g)
    lengths = torch.tensor([4, 20, 6])
    features = shots.repeat_interleave(lengths, 0) + 0.05 * torch.randn(30, 4, 16, generator=g)
    tokens = VisualTokens(features.flatten(0, 1), Layout.grid(2, 2, 30, "video"))
    counts = SceneTilling(boundaries=2).allocate(tokens, 30)
    assert [sum(counts[:4]), sum(counts[4:24]), sum(counts[24:])] == [10, 10, 10]
    whole = SceneTilling(boundaries=2, spread="frames").allocate(tokens, 24)
    assert sorted(set(whole)) == [0, 4]
    assert [sum(whole[:4]), sum(whole[4:24]), sum(whole[24:])] == [8, 8, 8]
    for bad in ({"spread": "scenes"}, {"boundaries": -1}, {"most": None}):
        with pytest.raises(OptionError):
            SceneTilling(**bad)


# WFS-SB


@claims("wfs_sb", anchor="scores")
def test_wfs_sb_golden(case: GoldenCase) -> None:
    scores, n = case.array("scores"), len(case.array("scores"))
    assert detail_level(n) == case.number("level")
    assert least_distance(n) == case.number("min_dist")
    np.testing.assert_allclose(detail_band(scores, detail_level(n)), case.array("detail"), atol=1e-9)
    assert relevance_boundaries(scores) == case.array("peaks").tolist()
    for key in case:
        if key.startswith("sel_"):
            features = None if "nofeat" in key else case.array("feat")
            assert wfs_sb(scores.tolist(), int(key.split("_")[-1]), features) == case.array(key).tolist(), key


def test_wfs_sb_keeps_all_scenes_where_none_matters() -> None:
    """Importances below 0.05 throughout: the published filter would leave no scene, and keeps them all instead."""
    scores = 0.001 * (np.arange(400) % 20 == 10)
    bounds = [0, *range(20, 400, 20), 400]
    assert (scene_importance(scores, bounds, (0.4, 0.2, 0.3, 0.0)) < 0.05).all()
    assert len({f // 20 for f in wfs_sb(scores, 20, weights=(0.4, 0.2, 0.3, 0.0))}) > 10


def test_wfs_sb_leaves_scenes_out_from_four_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad scene among n lies sqrt(n - 1) standard deviations below their mean: 1.41 of 3, 1.73 of 4."""
    for n, left_out in ((3, False), (4, True)):
        scores = np.full(20 * n, 0.6)
        scores[20:40] = 0.1
        monkeypatch.setattr(keyframes, "relevance_boundaries", lambda s: list(range(20, len(s), 20)))
        found = wfs_sb(scores, 12)
        assert (not any(20 <= f < 40 for f in found)) == left_out
        assert any(20 <= f < 40 for f in wfs_sb(scores, 12, strictness=1.8))


def test_wfs_sb_takes_no_scene_whose_importance_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 0.05, though near the mean: with weights of the best score alone, importances are the scores."""
    monkeypatch.setattr(keyframes, "relevance_boundaries", lambda s: list(range(20, len(s), 20)))
    for least, left_out in ((0.049, True), (0.051, False)):
        scores = np.repeat([0.06, least, 0.07, least], 20) / 0.3
        found = wfs_sb(scores, 20, weights=(0, 0, 0.3, 0), strictness=9)
        assert (not any(20 <= f < 40 or f >= 60 for f in found)) == left_out


def test_scores_that_differ_by_rounding_are_constant() -> None:
    for rule in (aks, wfs_sb):
        assert rule(1 + 1e-7 * np.arange(10), 3) == [1, 5, 8]
        assert rule(1 + 1e-5 * np.arange(10), 3) != [1, 5, 8]


def test_variance_is_relative_to_that_of_the_video_and_1e_8() -> None:
    scores = np.array([1e-4, -1e-4, 1e-4, -1e-4])  # variance 1e-8
    np.testing.assert_allclose(scene_importance(scores, [0, 2, 4], (0, 0, 0, 1)), [0.5, 0.5])
    np.testing.assert_allclose(scene_importance(scores, [0, 1, 4], (1, 0, 0, 0)), [0.25, 0.75])


def test_the_wavelet_is_orthogonal_and_its_bands_add_up() -> None:
    for shift in range(4):
        assert LOW[2 * shift :] @ LOW[: 8 - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-11)
        assert HIGH[2 * shift :] @ LOW[: 8 - 2 * shift] == pytest.approx(0, abs=1e-11)
    line = np.arange(64.0) ** 3  # four vanishing moments: a cubic has no detail away from the ends
    assert np.abs(detail_band(line, 1)[16:-16]).max() < 1e-5
    for n in range(1, 40):
        assert detail_band(np.random.default_rng(n).random(n), 1).shape == (n,)


def test_peaks() -> None:
    values = np.array([0, 3, 0, 1, 1, 1, 0, 2, 1.5, 2.5, 0, 9.0])
    assert prominent_peaks(values, 0, 0, 1) == [1, 4, 7, 9]  # the last value is no peak
    assert prominent_peaks(values, 1.5, 0, 1) == [1, 7, 9]
    assert prominent_peaks(values, 0, 1.0, 1) == [1, 4, 9]  # 7 stands out by 0.5
    assert prominent_peaks(values, 0, 0, 4) == [1, 9]
    assert prominent_peaks(np.ones(9), 0, 0, 1) == []


def test_wfs_sb_prefers_relevant_frames_that_differ() -> None:
    scores = np.full(30, 0.1)
    scores[10:14] = 0.9
    same, apart = np.ones((30, 2)), np.ones((30, 2))
    apart[13] = (1, -1)  # unlike the other relevant ones
    assert Diverse(scores, apart, 0.5).choose(0, 30, 2) == [10, 13]
    assert Diverse(scores, same, 0.5).choose(0, 30, 2) == [10, 11]
    assert Diverse(scores, apart, 0.0).choose(0, 30, 4) == [10, 11, 12, 13]
    assert Diverse(scores, apart, 1.0).choose(5, 30, 2, chosen=[10]) == [13, 5]
    assert Diverse(scores, None, 0.5).choose(0, 30, 2) == [10, 13]  # without features: far in time
    tokens = video(8, (3, 3), scores=torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.1, 0.2]))
    counts = WfsSb(score="self", balance=0.0).allocate(tokens, 13)
    assert sum(counts) == 13
    assert counts[1] == 9
    for bad in ({"weights": (1, 2)}, {"balance": 2.0}):
        with pytest.raises(OptionError):
            WfsSb(**bad)
    with pytest.raises(OptionError, match="30 frames"):
        wfs_sb(scores, 3, np.ones((4, 2)))
