"""FrameFusion's calls against the published trace, and the method in front of the LLM."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tests.published.framefusion import Fusion, framefusion_sparsity, framefusion_step
from tokprune.errors import BudgetError, OptionError
from tokprune.methods.connector.framefusion import (
    FrameFusion,
    framefusion_heads,
    framefusion_order,
    framefusion_similarity,
)


@claims("framefusion", anchor=("hidden", "ratio_cases"))
def test_golden(case: GoldenCase) -> None:
    if "ratio_cases" in case:
        for (*done, cost, layers), expected in zip(
            case["ratio_cases"].tolist(), case["ratio_out"].tolist(), strict=True
        ):
            found = framefusion_sparsity([share for share in done if share > 0], cost, int(layers))
            assert found == pytest.approx(expected, abs=1e-9)
        return
    hidden, patch = case["hidden"], case["patch_type"]
    *_, threshold, cost = case["params_N_pre_T_sth_cost"].tolist()
    order = framefusion_order(patch)
    order = order[patch[order] >= 0]
    assert torch.equal(order, case["token_index_by_patch"])
    similarity = framefusion_similarity(hidden, patch)[order]
    torch.testing.assert_close(similarity, case["sim_by_patch"], atol=1e-5, rtol=1e-5)
    state, position = Fusion(), torch.arange(len(patch))
    for call, before, after, merged, pruned in case["trace_in_out_merged_pruned"].tolist():
        assert len(hidden) == before
        attention = case[f"L{call}_attn"] if f"L{call}_attn" in case else None  # noqa: SIM401 - no mapping
        kept, hidden, state = framefusion_step(hidden, patch, state, cost, attention, threshold)
        position, patch = position[kept], patch[kept]
        assert len(hidden) == after
        assert (state.merged, state.pruned) == (bool(merged), bool(pruned))
        if f"L{call}_pos" in case:
            assert torch.equal(position, case[f"L{call}_pos"])
            torch.testing.assert_close(hidden, case[f"L{call}_hidden"], atol=1e-5, rtol=1e-5)


def test_the_pruning_call() -> None:
    """Nothing alike: merging ends with the first call, the next one prunes by attention, and then all is over."""
    g = torch.Generator().manual_seed(0)
    hidden, patch = torch.randn(12, 8, generator=g), torch.tensor([-1, *[0, 1, 2, 3, 4] * 2, -1])
    kept, hidden, state = framefusion_step(hidden, patch, Fusion(), cost=0.5, threshold=0.99)
    assert len(kept) == 12
    assert state == Fusion((0.0,), merged=True, pruned=False)
    with pytest.raises(OptionError, match="attention"):
        framefusion_step(hidden, patch, state, cost=0.5)
    attention = torch.arange(12.0)
    kept, hidden, state = framefusion_step(hidden, patch, state, cost=0.5, attention=attention)
    share = framefusion_sparsity([0.0], 0.5)
    assert kept.tolist() == [0, *range(11 - round(10 * (1 - share)), 12)]
    kept, _, _ = framefusion_step(hidden, patch[kept], state, cost=0.5)
    assert len(kept) == len(hidden)


def test_a_cost_that_is_spent_is_refused() -> None:
    with pytest.raises(BudgetError, match="too small"):
        framefusion_sparsity([0.0] * 10, 0.3)


def test_runs_flow_into_the_last_token_that_did_not_merge() -> None:
    patch = torch.tensor([-1, 0, 1, 0, 1, 0, 1, -1])
    merges = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0]).bool()
    assert framefusion_heads(patch, merges).tolist() == [0, 1, 2, 1, 4, 1, 4, 7]


def test_a_still_video_merges_and_a_moving_one_is_pruned() -> None:
    still = video(clip(6, (3, 3), scenes=1, moving=0.0), (3, 3))
    selection = FrameFusion().select(still, 9)
    assert torch.equal(selection.indices, torch.arange(9))
    expected = still.features.unflatten(0, (6, 9)).mean(0)
    torch.testing.assert_close(selection.apply(still.features), expected, atol=1e-5, rtol=1e-5)
    moving = video(clip(6, (3, 3), width=64, scenes=1, moving=1.1), (3, 3))
    selection = FrameFusion().select(moving, 9)
    best = moving.signals["cls_attention"].topk(9).indices.sort().values
    assert torch.equal(selection.indices, best)
    assert torch.equal(selection.apply(moving.features), moving.features[best])


def test_importance_is_the_mean_over_what_was_merged() -> None:
    """One place stands still, and the mean of its .6, .3 and .3 is .4; the other has .5, .1 and .45, never merged."""
    features = torch.eye(4)[torch.tensor([[0, 1], [0, 2], [0, 3]])]
    tokens = video(features, (1, 2))
    tokens.signals["cls_attention"][:] = torch.tensor([0.6, 0.5, 0.3, 0.1, 0.3, 0.45])
    for keep, kept in ((2, [1, 5]), (3, [0, 1, 5])):
        selection = FrameFusion().select(tokens, keep)
        assert selection.indices.tolist() == kept
        torch.testing.assert_close(selection.info["scores"], torch.tensor([0.4, 0.5, 0, 0.1, 0, 0.45]))


def test_no_more_merges_than_have_to_go() -> None:
    tokens = video(clip(6, (3, 3), scenes=1, moving=0.0), (3, 3))
    selection = FrameFusion().select(tokens, 50)
    assert selection.weights is not None
    rows = selection.weights.dense(50, 54)
    assert (rows.sum(0) > 0).all(), "every token is still part of the video"
    similarity = framefusion_similarity(tokens.features, torch.arange(9).repeat(6))
    gone = sorted(set(range(54)) - set(selection.indices.tolist()))
    assert gone == similarity.topk(4).indices.sort().values.tolist()


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="threshold"):
        FrameFusion(threshold=1.5)
