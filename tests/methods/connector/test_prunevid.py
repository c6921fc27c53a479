"""PruneVid's first stage against the published tokens; scenes, still places, budgets."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tests.published.prunevid import prunevid, prunevid_second_stage
from tokprune.errors import OptionError
from tokprune.methods.connector.prunevid import PruneVid, frame_clusters, prunevid_constancy, prunevid_scenes, refine
from tokprune.ops.frames import run_lengths
from tokprune.ops.similarity import cosine_similarity
from tokprune.tokens import Layout, VisualTokens


@claims("prunevid", anchor=("feat_THWC", "refine_in"))
def test_golden(case: GoldenCase) -> None:
    if "refine_in" in case:
        assert [refine(labels) for labels in case["refine_in"].tolist()] == case["refine_out"].tolist()
        return
    features = case["feat_THWC"].float().flatten(1, 2)
    tau, scenes, clusters = case["params_tau_seg_clu"].tolist()
    labels = frame_clusters(features.mean(1), int(len(features) * scenes))
    assert labels.tolist() == case["cluster_raw"][0].tolist()
    assert refine(labels.tolist()) == case["cluster_refined"][0].tolist()
    out, still, moving, lengths = prunevid(features, tau, scenes, clusters)
    assert lengths == case["window_sizes"].tolist()
    assert still.tolist() == case["static_sizes"].tolist()
    assert moving.tolist() == case["dynamic_sizes"].tolist()
    torch.testing.assert_close(out, case["out"], atol=1e-5, rtol=1e-5)

    # The same tokens through the method, in the order of the stream.
    frames, n, _ = features.shape
    tokens = VisualTokens(features.flatten(0, 1), Layout.grid(1, n, frames, "video"))
    method = PruneVid(tau, scenes, clusters, compat="published")
    ours = method.select(tokens, 1).apply(tokens.features)
    assert len(ours) == len(out)
    gap = torch.cdist(ours, case["out"], compute_mode="donot_use_mm_for_euclid_dist").min(-1)
    assert gap.values.max() < 1e-4
    assert len(set(gap.indices.tolist())) == len(out)

    # The second stage; the stored attention was rounded, so that equal values may be told apart only by chance.
    attention = case["attn_text_to_img"].float()
    groups = [
        count
        for s, m, length in zip(still.tolist(), moving.tolist(), lengths, strict=True)
        for count in [s, *[m // length] * length]
    ]
    kept, expected = prunevid_second_stage(attention, groups), case["llm_keep_alpha0.4"]
    owner = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    assert torch.equal(owner[kept], owner[expected])
    worth = attention.amax((0, 1))
    for group in owner[kept].unique():
        assert torch.equal(
            worth[kept[owner[kept] == group]].sort().values, worth[expected[owner[expected] == group]].sort().values
        )


def test_constancy_is_the_mean_cosine_over_pairs() -> None:
    features = clip(5, (2, 3), scenes=1)
    place = torch.arange(30).view(5, 6)
    found = prunevid_constancy(features.flatten(0, 1), place, [5])[0]
    for p in range(6):
        cosine = cosine_similarity(features[:, p])
        pairs = cosine[~torch.eye(5, dtype=torch.bool)]
        torch.testing.assert_close(found[p], pairs.mean(), atol=1e-5, rtol=1e-4)


def test_scenes_are_found() -> None:
    assert prunevid_scenes(clip(16, scenes=4, moving=0.0).mean(1), 4) == [4, 4, 4, 4]
    assert prunevid_scenes(clip(3, scenes=1).mean(1), 0) == [3]  # below seven frames all are neighbours


def test_a_still_place_is_one_token_for_all_frames_of_its_scene() -> None:
    features = clip(8, (3, 3), scenes=1, moving=0.0)
    tokens = video(features, (3, 3))
    selection = PruneVid(scene_share=0.1).select(tokens, 9)
    torch.testing.assert_close(selection.apply(tokens.features), features.mean(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(selection.indices, torch.arange(9))


def test_still_places_move_again_where_the_budget_asks_for_more() -> None:
    features = clip(8, (3, 3), scenes=1, moving=0.0)
    tokens = video(features, (3, 3))
    for keep in (9, 10, 17, 40, 72):
        selection = PruneVid(scene_share=0.1).select(tokens, keep)
        assert len(selection) == keep
        assert selection.weights is not None
        rows = selection.weights.dense(keep, 72)
        torch.testing.assert_close(rows.sum(-1), torch.ones(keep))
        assert (rows > 0).sum(0).max() == 1, "a token flows into two outputs"


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="scene_share"):
        PruneVid(scene_share=0)


def test_clusters_of_frames_find_scenes() -> None:
    frames = clip(12, scenes=3, moving=0.0).mean(1)
    labels = frame_clusters(frames, 3)
    assert run_lengths(labels.tolist()) == [4, 4, 4]
    assert frame_clusters(frames[:1], 1).tolist() == [0]


def test_refine_without_a_run_is_one_scene() -> None:
    assert refine([0, 1, 2, 3]) == [0, 0, 0, 0]
    assert refine([5]) == [0]
    assert refine([1, 1, 2, 0, 0, 0]) == [1, 1, 0, 0, 0, 0]
