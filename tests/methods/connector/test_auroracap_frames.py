"""AuroraCap over frames: means of originals, frame by frame, to the exact number."""

from __future__ import annotations

import pytest
import torch

from tests.methods.connector.clips import clip, video
from tokprune.errors import OptionError
from tokprune.methods.connector.auroracap_frames import AuroraCapFrames, auroracap_frames
from tokprune.ops.merge import bipartite_matching


@pytest.mark.parametrize("rounds", [1, 4, 24])
def test_every_number_is_reached(rounds: int) -> None:
    features = clip(3, (3, 5))
    for keep in range(1, 16):
        rep, assign = auroracap_frames(features, keep, rounds)
        assert rep.shape == (3, keep)
        assert (rep.diff(dim=-1) > 0).all()
        assert (assign.gather(1, rep) == torch.arange(keep)).all(), "a token that is left belongs to itself"
        assert all(len(a.unique()) == keep for a in assign)


def test_one_round_is_bipartite_soft_matching() -> None:
    features = clip(2, (4, 4))
    matching = bipartite_matching(features, 5, ordered=True)
    rep, assign = auroracap_frames(features, 11, rounds=1)
    assert torch.equal(rep, matching.rep)
    assert torch.equal(assign, matching.assign)


def test_frames_do_not_mix_and_nothing_is_lost() -> None:
    tokens = video(clip(5), (6, 6))
    selection = AuroraCapFrames().select(tokens, 47)
    assert selection.weights is not None
    rows = selection.weights.dense(47, len(tokens))
    torch.testing.assert_close(rows.sum(-1), torch.ones(47))
    group = tokens.layout.group
    assert (group[selection.indices][:, None] == group[None])[rows > 0].all()
    assert sorted(torch.bincount(group[selection.indices]).tolist()) == [9, 9, 9, 10, 10]
    sizes = (rows > 0).sum(-1).float()
    torch.testing.assert_close(
        (selection.apply(tokens.features) * sizes[:, None]).sum(0), tokens.features.sum(0), atol=1e-3, rtol=1e-4
    )


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="rounds"):
        AuroraCapFrames(rounds=0)
