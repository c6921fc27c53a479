"""HoloV against the published choice, and the two ways in which that choice misses its paper."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.connector.holov import HoloV, holov, holov_published
from tokprune.tokens import Layout, VisualTokens


@claims("holov", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features, attention = case["features"], case["cls_attn"]
    keep, crops = case.number("K"), case.number("num_crops")
    order, quota = holov_published(features, attention, keep, crops)
    assert torch.equal(quota[0], case["alloc"])
    assert torch.equal(order[0], case["out_index_in_order"])
    assert torch.equal(order[0], case["qwen_positions"])
    tokens = torch.where(order[..., None] >= 0, features[0, order.clamp(min=0)], 0.0)
    torch.testing.assert_close(tokens, case["out_tokens"])
    # The published defect: attention alone gives the same allocation.
    blank, shares = holov_published(torch.ones_like(features), attention, keep, crops)
    assert torch.equal(shares, quota)
    assert torch.equal(blank, order)
    # Through the method: the real tokens of the published choice, and as many as asked for.
    stream = VisualTokens(features[0], Layout.grid(1, features.shape[1]), {"cls_attention": attention[0]})
    indices = HoloV(crops=crops, compat="published").select(stream, keep).indices
    assert torch.isin(order[0][order[0] >= 0], indices).all()
    assert len(indices) == keep


def test_concentrated_attention_wastes_no_slot() -> None:
    """All attention in one crop of 16 tokens: the published code feeds 16 zero vectors for a budget of 32."""
    features = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    attention = torch.full((1, 64), 1e-9)
    attention[0, :16] = 1 / 16
    order, quota = holov_published(features, attention, 32, 4)
    assert quota[0, 0] == 32
    assert int((order < 0).sum()) == 16
    chosen = holov(features, attention, 32, 4, gamma=0.0)
    assert len(set(chosen[0].tolist())) == 32
    assert set(range(16)) <= set(chosen[0].tolist())
    assert torch.bincount(chosen[0] // 16).tolist()[1:] == [6, 5, 5]
    stream = VisualTokens(features[0], Layout.grid(8, 8), {"cls_attention": attention[0]})
    for compat in ("corrected", "published"):
        indices = HoloV(crops=4, compat=compat).select(stream, 32).indices  # type: ignore[arg-type]
        assert len(indices.unique()) == 32


def test_diversity_counts() -> None:
    """Equal attention, one crop of mixed content among uniform ones: it gets more than its share."""
    features = torch.ones(1, 64, 8)
    features[0, 16:32:2] = -1.0  # similarities of one and minus one
    attention = torch.full((1, 64), 1 / 64)
    even = torch.bincount(holov(features, attention, 16, 4, gamma=0.0)[0] // 16, minlength=4).tolist()
    diverse = torch.bincount(holov(features, attention, 16, 4, gamma=1.0)[0] // 16, minlength=4).tolist()
    assert even == [4, 4, 4, 4]
    assert diverse[1] > 5
    assert sum(diverse) == 16
    assert holov_published(features, attention, 16, 4)[1].max() <= 5  # equal weights, rounded


def test_inside_a_crop_the_score_decides() -> None:
    g = torch.Generator().manual_seed(2)
    features, attention = torch.randn(1, 20, 6, generator=g), torch.rand(1, 20, generator=g)
    x = torch.nn.functional.normalize(features[0].double(), dim=-1)
    s = (x @ x.T).fill_diagonal_(0)
    variance = ((s - s.sum(1, keepdim=True) / 19) ** 2).sum(1) / 19
    score = attention[0] + 0.5 * variance * attention.mean() / variance.mean()
    assert holov(features, attention, 7, 1, gamma=0.5)[0].tolist() == score.topk(7).indices.sort().values.tolist()


def test_similarities_vary_about_the_mean_over_the_others() -> None:
    """Three tokens at 0, 0 and 60 degrees: cosines (0, 1, .5), (1, 0, .5), (.5, .5, 0) about .75, .75 and .5, squares
    over 2: variances .34375, .34375, .125. With attentions .2, .2 and .2 + d the last one is best from d = .221 on."""
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]]])
    for last, best in ((0.412, 0), (0.43, 2)):
        assert holov(features, torch.tensor([[0.2, 0.2, last]]), 1, 1, gamma=1.0).tolist() == [[best]]


def test_sharper_allocation() -> None:
    attention = torch.cat([torch.full((1, 8), 0.3), torch.full((1, 8), 0.1)], dim=1)
    features = torch.ones(1, 16, 4)
    for tau, first in ((0.0, 4), (1.0, 6), (2.0, 7)):
        assert int((holov(features, attention, 8, 2, tau=tau) < 8).sum()) == first
