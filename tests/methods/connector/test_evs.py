"""EVS against vLLM's masks, and what happens below one frame."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tokprune.budget import kept
from tokprune.methods.connector.evs import EVS
from tokprune.tokens import Layout, VisualTokens


@claims("evs", anchor="embeds")
def test_golden(case: GoldenCase) -> None:
    frames, height, width = case["thw"].tolist()
    n = height * width // (case.number("merge") if "merge" in case else 1) ** 2
    features, mask = case["embeds"].unflatten(0, (frames, n)), case["mask"]
    keep = max(n, int(frames * n * (1 - case.number("q"))))
    if "count" in case:
        assert keep == case.number("count")
    tokens = VisualTokens(features.flatten(0, 1), Layout.grid(1, n, frames, "video"))
    found = EVS(compat="published").select(tokens, keep).indices
    assert len(found) == int(mask.sum())
    if case.name == "tie":  # identical frames: rounding decides in the published code, the lower index here
        assert torch.equal(found, torch.arange(keep))
        assert mask[:n].all()
        return
    assert torch.equal(found, mask.nonzero()[:, 0])
    if "mrope" in case:  # positions stay those of the whole video
        assert torch.equal(case["mrope"][found], case["mrope_kept"])
    assert torch.equal(EVS().select(tokens, keep).indices, found)
    assert torch.equal(EVS(compat="published").select(tokens, 1).indices, torch.arange(n))


def test_what_moves_stays() -> None:
    features = clip(6, (4, 4), scenes=1, moving=0.0)
    features[3, 5] += 3.0  # one token changes once, and back
    tokens = video(features, (4, 4))
    found = EVS().select(tokens, 16 + 2).indices
    assert found[16:].tolist() == [3 * 16 + 5, 4 * 16 + 5]
    assert EVS().scores(tokens)[:16].eq(255).all()


def test_a_budget_below_one_frame_is_met_and_spread_over_time() -> None:
    tokens = video(clip(8, (4, 4)), (4, 4))
    for keep in range(1, 16):
        frames = tokens.layout.group[EVS().select(tokens, keep).indices]
        assert len(frames) == keep
        assert int((frames == 0).sum()) == max(1, round(keep / 8))
    assert len(EVS(compat="published").select(tokens, 3).indices) == 16


def test_a_picture_is_spread_evenly_not_cut_off_at_the_top() -> None:
    tokens = VisualTokens(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), Layout.grid(8, 8))
    rows = tokens.layout.row[EVS().select(tokens, 16).indices]
    assert torch.bincount(rows // 2, minlength=4).tolist() == [4, 4, 4, 4]


def test_a_count_is_not_lost_to_rounding() -> None:
    assert int((1 - 0.9) * 100) == 9  # the published count of 100 tokens at q = 0.9
    assert kept(100, 0.1) == 10
