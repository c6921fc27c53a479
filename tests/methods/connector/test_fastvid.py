"""FastVID against the published code for two models; exact splits; merging."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tests.published.fastvid import fastvid
from tokprune.errors import OptionError
from tokprune.methods.connector.fastvid import FastVID, anchors, changing_frames, fastvid_onevision_split, fastvid_split
from tokprune.ops.frames import similar_runs
from tokprune.registry import get_method
from tokprune.tokens import Layout, VisualTokens


@claims("fastvid", anchor="feat")
def test_golden(case: GoldenCase) -> None:
    features, attention, frames = case["feat"].float(), case["attn"], case["global"]
    ratio, c, tau, share, stride, beta = case["params_ratio_c_tau_d_p_beta"].tolist()
    options = (ratio, int(c) - 1, tau, share, int(stride), beta)
    cosine = torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    torch.testing.assert_close(cosine, case["sim"], atol=1e-5, rtol=1e-5)
    lengths = similar_runs(frames, int(c) - 1, tau)
    assert lengths == case["segments"].tolist()
    n = features.shape[1]
    split = [fastvid_onevision_split(int(ratio * n), length, share, int(stride)) for length in lengths]
    assert [k for _, context in split for k in context] == case["ctx_per_frame"].tolist()
    assert {k for salient, _ in split for k in salient} == {case.number("salient_num")}
    kept, out = fastvid(features, attention, frames, *options)
    assert torch.equal(kept, case["keep"])
    torch.testing.assert_close(out, case["out"], atol=1e-5, rtol=1e-5)

    # LLaVA-Video: positions in grids with one more column, the newline, which stays where its row keeps a token.
    kept, out = fastvid(features, attention, frames, *options, model="video")
    g = round(n**0.5)
    place = case["lv_keep_gridnewline"]
    row, col = place // (g + 1), place % (g + 1)
    token = col < g
    assert torch.equal(kept, row[token] * g + col[token])
    torch.testing.assert_close(out, case["lv_out"][token], atol=1e-5, rtol=1e-5)
    assert torch.equal((kept // g).unique(), row[~token])


@claims("fastvid_qwen", anchor="feat")
def test_golden_of_qwen(case: GoldenCase) -> None:
    features = case["feat"].float()
    frames, n, _ = features.shape
    ratio, c, tau, ignore, share, stride, beta = case["params_ratio_c_tau_ignore_d_p_beta"].tolist()
    method = FastVID(int(c), tau, share, int(stride), ignore, beta, compat="published")
    tokens = VisualTokens(
        features.flatten(0, 1), Layout.grid(1, n, frames, "video"), {"cls_attention": case["attn"].flatten()}
    )
    selection = method.select(tokens, int(ratio * n) * frames)
    assert torch.equal(selection.indices, case["keep"])
    torch.testing.assert_close(selection.apply(tokens.features), case["out"], atol=1e-5, rtol=1e-5)
    settings = get_method("fastvid", preset="qwen2_5_vl")
    assert (settings.tau, settings.ignore) == (tau, ignore)  # type: ignore[attr-defined]


def test_a_frame_changes_where_its_cosine_is_below_the_limit() -> None:
    frames = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert changing_frames(frames, [4], 1.0) == [[1, 3]]  # 1 is not below 1; the last of a scene always counts
    assert changing_frames(frames, [1, 3], 1.0) == [[0], [0, 2]]
    assert changing_frames(frames, [4], None) == [[0, 1, 2, 3]]


def test_frames_that_repeat_keep_nothing_until_the_budget_needs_them() -> None:
    tokens = video(clip(12, scenes=2, moving=0.0), (6, 6))  # two still scenes of six frames
    method = FastVID(c=1, tau=0.5, ignore=0.95)
    for keep in (8, 40, 72):
        frames = tokens.layout.group[method.select(tokens, keep).indices]
        assert len(frames) == keep
        assert set(frames.tolist()) <= {5, 11}
    assert set(tokens.layout.group[method.select(tokens, 74).indices].tolist()) == set(range(12))


def test_anchors_are_counted_from_the_end() -> None:
    assert anchors(5, 4) == [4, 0]
    assert anchors(6, 4) == [5, 1]
    assert anchors(1, 4) == [0]


@pytest.mark.parametrize("even", [True, False])
def test_splits_are_exact_for_every_budget(even: bool) -> None:
    for sizes in ([9], [4, 4, 4], [9, 1, 5, 7, 2, 8], [6] * 11):
        for budget in range(sum(sizes) + 1):
            salient, context = fastvid_split(budget, sizes, even=even)
            assert sum(salient) + sum(context) == budget
            assert all(min(s, c) >= 0 and s + c <= n for s, c, n in zip(salient, context, sizes, strict=True))
            assert all(k == 0 for t, k in enumerate(context) if t not in anchors(len(sizes), 4))


def test_a_centre_is_a_mean_that_leans_to_itself() -> None:
    tokens = video(clip(12), (6, 6))
    selection = FastVID(c=3).select(tokens, 100)
    assert selection.weights is not None
    rows = selection.weights.dense(100, len(tokens))
    torch.testing.assert_close(rows.sum(-1), torch.ones(100), atol=1e-5, rtol=1e-5)
    own = rows[torch.arange(100), selection.indices]
    merged = (rows > 0).sum(-1) > 1
    assert 0 < int(merged.sum()) <= 40
    torch.testing.assert_close(own[merged], torch.full_like(own[merged], 0.6))
    assert (own[~merged] == 1).all()
    salient = selection.info["salient"]
    assert (rows[:, salient].sum(0) == 1).all(), "salient tokens flow into themselves alone"


def test_pieces_of_a_long_scene_keep_anchors_and_merge_within_themselves() -> None:
    tokens = video(clip(24, scenes=1, moving=0.2), (6, 6))
    whole, pieces = FastVID(c=1, tau=-1), FastVID(c=1, tau=-1, longest=8)
    a, b = whole.select(tokens, 200), pieces.select(tokens, 200)
    assert torch.equal(a.indices, b.indices)
    assert b.weights is not None
    rows = b.weights.dense(200, len(tokens)) > 0
    piece = tokens.layout.group // 8
    assert (piece[b.indices][:, None] == piece[None])[rows].all()


def test_what_the_published_code_cannot_do_is_refused_there_and_works_here() -> None:
    short, long = video(clip(5), (6, 6)), video(clip(16, scenes=1, moving=0.1), (6, 6))
    for tokens, keep, c in ((short, 60, 8), (long, 8 * 36, 1), (long, 20, 8)):
        with pytest.raises(OptionError, match="published"):
            FastVID(c=c, tau=-1, compat="published").select(tokens, keep)
        assert len(FastVID(c=c, tau=-1).select(tokens, keep)) == keep


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="multiple"):
        FastVID(longest=10)
    with pytest.raises(OptionError, match="share"):
        FastVID(share=1.5)
    with pytest.raises(OptionError, match="c="):
        FastVID(c=0)
