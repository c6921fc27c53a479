"""VidCom2 against the published scores and counts, and against vLLM's exact variant."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tokprune.errors import OptionError
from tokprune.methods.connector.vidcom2 import VidCom2, calm_channels, vidcom2, vidcom2_likeness, vidcom2_ratios
from tokprune.ops.topk import top_by_tier
from tokprune.tokens import Layout, VisualTokens


def parts(case: GoldenCase) -> tuple[torch.Tensor, torch.Tensor, int, int, float]:
    """Features, frame numbers, frames, tokens per frame, ratio."""
    features = case["embeds"]
    if "thw" in case:
        frames, height, width = case["thw"].tolist()
        n, ratio = height * width, 1 - case.number("q")
    else:
        n, ratio = case.number("h") ** 2, case.number("base")
        frames = len(features) // n
    return features, torch.arange(frames).repeat_interleave(n), frames, n, ratio


@claims("vidcom2", anchor="embeds")
def test_golden(case: GoldenCase) -> None:
    features, frame, frames, n, ratio = parts(case)
    counts, stays, redundancy = vidcom2(features, frame, torch.full((frames,), n), ratio)
    assert torch.equal(counts, case["ks"])
    kept = stays.nonzero()[:, 0]
    if (
        "keep_concat" in case
    ):  # LLaVA-Video: all newlines of a frame behind its tokens, in a grid of h rows and h + 1 columns
        assert torch.equal(kept % n, case["keep_concat"])
        h = case.number("h")
        newline = torch.arange(h) * (h + 1) + h
        expected = []
        for t in range(frames):
            cell = kept[frame[kept] == t] % n
            expected += [cell // h * (h + 1) + cell % h + t * h * (h + 1), newline + t * h * (h + 1)]
        assert torch.equal(torch.cat(expected), case["index_with_newlines"])
        return
    assert torch.equal(kept, case["keep_official"])
    likeness = vidcom2_likeness(features, frame, frames)
    torch.testing.assert_close(likeness.video, case["v_score"].flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(likeness.frame, case["f_score"].flatten(), atol=1e-5, rtol=1e-5)
    ratios = vidcom2_ratios(likeness.video, frame, frames, ratio)
    torch.testing.assert_close(ratios, case["scales"], atol=2e-5, rtol=1e-5)
    assert set(calm_channels(features).tolist()) == set(case["low_var_idx"].tolist())

    # vLLM's variant: the sum repaired to the exact count.
    target, expected = case.number("target_vllm"), case["mask_vllm"].nonzero()[:, 0]
    assert torch.equal(top_by_tier(stays.long(), -redundancy, target), expected)
    if target / len(features) == ratio:  # else select(), which is told the count, has a slightly different ratio
        tokens = VisualTokens(features, Layout.grid(1, n, frames, "video"))
        assert torch.equal(VidCom2().select(tokens, target).indices, expected)


def test_an_unusual_frame_keeps_more() -> None:
    features = 1 + 0.3 * torch.randn(8, 36, 16, generator=torch.Generator().manual_seed(0))
    features[5] *= -1
    tokens = video(features, (6, 6))
    counts = torch.bincount(tokens.layout.group[VidCom2().select(tokens, 72).indices], minlength=8)
    assert int(counts.argmax()) == 5
    assert int(counts[5]) >= 1.5 * 72 / 8
    assert int(counts.sum()) == 72


def test_the_published_counts_miss_the_budget() -> None:
    tokens = video(clip(8), (6, 6))
    published = [len(VidCom2(compat="published").select(tokens, k)) for k in range(20, 60)]
    assert published != list(range(20, 60))
    assert [len(VidCom2().select(tokens, k)) for k in range(20, 60)] == list(range(20, 60))


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="temperature"):
        VidCom2(temperature=0)
    with pytest.raises(OptionError, match="compat"):
        VidCom2(compat="publisched")  # type: ignore[arg-type]
