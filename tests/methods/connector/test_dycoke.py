"""DyCoke's TTM against the published order, and what the budget makes of it."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tokprune.errors import OptionError
from tokprune.methods.connector.dycoke import DyCoke, dycoke_published, reference_steps
from tokprune.tokens import Layout, VisualTokens


@claims("dycoke", anchor="embeds")
def test_golden(case: GoldenCase) -> None:
    frames, n = case["T_N"].tolist()
    features, ratio = case["embeds"].unflatten(0, (frames, n)), case.number("k")
    expected = case["kept_in_output_order"]
    assert torch.equal(dycoke_published(features, ratio), expected)
    tokens = VisualTokens(case["embeds"], Layout.grid(1, n, frames, "video"))
    chosen = DyCoke(merging_ratio=ratio, compat="published").select(tokens, 1)
    assert torch.equal(chosen.indices, expected.sort().values)


def test_the_first_of_four_has_no_reference() -> None:
    assert reference_steps(9).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    features = torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 2], [3, 1], [3, 4], [0, 1]]), 5).float()
    scores = DyCoke().select(video(features, (1, 2)), 5).info["scores"]
    assert scores.tolist() == [2, 2, 0, 1, 1, 0, 0, 1, 2, 2]  # 1 - cosine, and 2 where there is nothing to look at


def test_at_the_published_share_it_is_the_publication() -> None:
    """Eight frames whose published counts are whole numbers; the third frame of the last four is thinned like the
    others."""
    features = clip(8, (4, 5), scenes=1)
    tokens = video(features, (4, 5))
    chosen = DyCoke(merging_ratio=0.7).select(tokens, 2 * 20 + 6 * 6).indices
    frame = tokens.layout.group[chosen]
    assert torch.bincount(frame).tolist() == [20, 6, 6, 6, 20, 6, 6, 6]
    published = dycoke_published(features).sort().values
    assert torch.equal(chosen[frame != 6], published[tokens.layout.group[published] != 6])


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7])
def test_no_frame_is_lost(frames: int) -> None:
    tokens = video(clip(frames, scenes=1), (6, 6))
    chosen = DyCoke().select(tokens, 10 * frames)
    counts = torch.bincount(tokens.layout.group[chosen.indices], minlength=frames)
    assert int(counts.sum()) == 10 * frames
    assert int(counts.min()) > 0
    if frames < 5:
        with pytest.raises(OptionError, match="more than 4 frames"):
            DyCoke(compat="published").select(tokens, 10 * frames)


def test_thinned_frames_keep_what_changed() -> None:
    features = clip(4, scenes=1, moving=0.0)
    features[1, 7] = -features[1, 7]
    features[2, 9] = -features[2, 9]
    chosen = DyCoke(merging_ratio=0.99).select(video(features, (6, 6)), 36 + 3).indices.tolist()
    assert 36 + 7 in chosen
    assert 2 * 36 + 9 in chosen


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="merging_ratio"):
        DyCoke(merging_ratio=1.0)
