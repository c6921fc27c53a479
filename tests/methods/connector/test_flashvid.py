"""FlashVID's outer stage against the published tokens; trees that are means; exact budgets."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tests.published.flashvid import flashvid
from tokprune.errors import OptionError
from tokprune.methods.connector.flashvid import (
    FlashVID,
    Parts,
    flashvid_diverse,
    flashvid_flow,
    flashvid_links,
    flashvid_trees,
    scene_relevance,
)
from tokprune.ops.frames import similar_runs
from tokprune.ops.similarity import cosine_distance
from tokprune.tokens import Layout


@claims("flashvid", anchor="feat")
def test_golden(case: GoldenCase) -> None:
    features, attention, expected = case["feat"].float(), case["attn"], case["out"]
    retention, expansion, segments, alpha, threshold, cut = case["cfg_ret_exp_minseg_alpha_tthr_sthr"].tolist()
    assert similar_runs(features.mean(1), int(segments) - 1, cut) == case["segments"].tolist()
    kept, out = flashvid(features, attention, retention, expansion, alpha, int(segments), cut, threshold)
    assert torch.equal(kept, case["keep"])
    for place in kept.unique():  # a position that comes twice comes in either order
        ours, theirs = out[kept == place], expected[kept == place]
        gap = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
        assert min(gap.diagonal().max(), gap.flip(0).diagonal().max()) < 1e-4


def test_diverse_tokens_are_far_and_attended() -> None:
    g = torch.Generator().manual_seed(0)
    features, attention = torch.randn(1, 12, 8, generator=g), torch.rand(1, 12, generator=g)
    order = flashvid_diverse(features, attention, 5)[0].tolist()
    distance = cosine_distance(features)[0]
    for step in range(1, 5):
        worth = distance[order[:step]].amin(0) * attention[0]
        worth[order[:step]] = -1
        assert int(worth.argmax()) == order[step]


def test_links_go_to_the_most_similar_free_token_of_the_frame_before() -> None:
    features = clip(4, (2, 3), scenes=1, moving=0.5).flatten(0, 1)
    free = torch.rand(24, generator=torch.Generator().manual_seed(3)) > 0.3
    place, scene = torch.arange(24).view(4, 6), torch.tensor([0, 0, 1, 1])
    partner, _ = flashvid_links(features, free, place, scene)
    similarity = 1 - cosine_distance(features)
    for i in range(24):
        t = i // 6
        if not free[i] or t in (0, 2):
            assert partner[i] == -1
            continue
        before = [j for j in range(6 * (t - 1), 6 * t) if free[j]]
        assert int(partner[i]) == max(before, key=lambda j: float(similarity[i, j]))


def test_trees() -> None:
    parent = torch.tensor([0, 1, 0, 1, 2, 2, 4])
    root, size, children = flashvid_trees(parent, 5)
    assert root.tolist() == [0, 1, 0, 1, 0, 0, 0]
    assert size[:2].tolist() == [5, 2]
    assert children[:3].tolist() == [1, 1, 2]


def test_a_tree_is_a_mean_and_in_the_published_code_a_sum_too_large() -> None:
    features = clip(5, (2, 2), scenes=1, moving=0.0)
    tokens = video(features, (2, 2))
    ours = FlashVID(alpha=0.0, segments=1, cut=-1).select(tokens, 4)
    torch.testing.assert_close(ours.apply(tokens.features), features.mean(0), atol=1e-5, rtol=1e-5)
    for keep in (3, 4, 8, 12, 19):
        selection = FlashVID(alpha=0.3, segments=1, cut=-1).select(tokens, keep)
        assert selection.weights is not None
        torch.testing.assert_close(selection.weights.dense(keep, 20).sum(-1), torch.ones(keep), atol=1e-5, rtol=1e-5)
    published = FlashVID(alpha=0.0, segments=1, cut=-1, compat="published").select(tokens, 5)
    assert published.weights is not None
    assert published.weights.dense(len(published), 20).sum(-1).max() > 2  # a chain of five, halved


def test_published_counts_are_not_lost_to_single_precision() -> None:
    """Of 26 trees in two equal frames 14 stay: 13 x 14/26 is 7 in each, where float32 makes 7.0000005 and rounds up."""
    assert float(torch.tensor(13) * (torch.tensor(14) / torch.tensor(26))) > 7
    features = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0))
    parts = Parts([0, 0], [14], [0])
    layout = Layout.grid(1, 13, 2, "video")
    _, goal, _ = flashvid_flow(features.flatten(0, 1), torch.ones(26), layout, [2], parts, 0.999, published=True)
    centres = goal[goal == torch.arange(26)]
    assert torch.bincount(centres // 13).tolist() == [7, 7]


def test_relevance_is_the_likeness_to_the_scene() -> None:
    features = clip(4, (2, 3), scenes=2, moving=0.5)
    relevance = scene_relevance(features.flatten(0, 1), Layout.grid(2, 3, 4, "video"), [2, 2])
    for t in range(4):
        centre = features[t // 2 * 2 : t // 2 * 2 + 2].mean((0, 1))
        torch.testing.assert_close(relevance.view(4, 6)[t], features[t] @ centre, atol=1e-5, rtol=1e-4)
    tokens = video(features + 1, (2, 3))
    method = FlashVID(alpha=1.0, segments=1, cut=-1, relevance=True)
    worth = tokens.signals["cls_attention"] * scene_relevance(tokens.features, tokens.layout, [4])
    expected = flashvid_diverse((features + 1), worth.view(4, 6), 3).sort(-1).values + 6 * torch.arange(4)[:, None]
    assert torch.equal(method.select(tokens, 12).indices, expected.flatten())


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="alpha"):
        FlashVID(alpha=1.2)
    with pytest.raises(OptionError, match="segments"):
        FlashVID(segments=0)
