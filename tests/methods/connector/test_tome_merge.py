"""ToMe merging on the connector's stream: exact counts, plain means, raster order."""

from __future__ import annotations

import pytest
import torch

from tokprune.errors import OptionError
from tokprune.methods.connector.tome_merge import ToMeMerge, tome_merge
from tokprune.tokens import Layout, VisualTokens


def features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 3, 9, 64])
def test_each_output_is_the_mean_of_its_originals(n: int) -> None:
    x = features(n)
    for keep in {1, 2, n // 3, n // 2, n - 1, n} - {0, -1}:
        if keep > n:
            continue
        selection = ToMeMerge().select(VisualTokens(x, Layout.line(n)), keep)
        target = selection.weights.target  # type: ignore[union-attr]
        out = selection.apply(x)
        assert out.shape == (keep, 8)
        for k in range(keep):
            members = (target == k).nonzero()[:, 0]
            assert selection.indices[k] in members, "a merged token must sit at one of its originals"
            torch.testing.assert_close(out[k], x[members].mean(0))
        assert torch.equal(selection.info["sizes"], torch.bincount(target, minlength=keep).float())


def test_one_round_written_out() -> None:
    x = features(12)
    rep, assign = (t[0] for t in tome_merge(x[None], 9, share=0.25))
    cosine = torch.nn.functional.cosine_similarity(x[0::2, None], x[None, 1::2], dim=-1)
    value, partner = cosine.max(-1)
    merged = value.topk(3).indices
    gone = (2 * merged).tolist()
    assert rep.tolist() == [i for i in range(12) if i not in gone]
    for a in merged.tolist():
        assert rep[assign[2 * a]] == 2 * partner[a] + 1


def test_copies_merge_first() -> None:
    x = features(6).repeat_interleave(2, 0)  # each token twice, side by side
    selection = ToMeMerge().select(VisualTokens(x, Layout.line(12)), 6)
    torch.testing.assert_close(selection.apply(x), features(6))


def test_gradients_reach_every_original() -> None:
    x = features(10).requires_grad_()
    ToMeMerge().select(VisualTokens(x, Layout.line(10)), 3).apply(x).sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()  # type: ignore[union-attr]


def test_share_is_checked() -> None:
    with pytest.raises(OptionError, match="share"):
        ToMeMerge(share=0.6)
