"""PruMerge against the published tokens, and its exact-budget form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.attention import cls_row
from tokprune.methods.connector.prumerge import PruMerge, best, prumerge_count, prumerge_rows
from tokprune.tokens import Layout, VisualTokens


@claims("prumerge", anchor="hidden_states")
def test_golden(case: GoldenCase) -> None:
    hidden, q, k = case["hidden_states"], case["q"], case["k"]
    attention = cls_row(q, k, heads=1)[:, 0]
    torch.testing.assert_close(attention, case["cls_attn"], atol=1e-6, rtol=1e-4)
    n = attention.shape[1]
    count = int(prumerge_count(attention)) if case.number("adaptive") else n // 8
    assert count / n == pytest.approx(case.number("ratio"), rel=1e-6)
    kept = best(attention, count)
    assert torch.equal(kept, case["kept_topk_order"])
    rows = prumerge_rows(attention, k[:, 1:], kept, compat="published")
    torch.testing.assert_close(rows @ hidden[:, 1:], case["out_tokens"], atol=1e-5, rtol=1e-5)
    # The same through the method at the published count: the same rows, by position.
    signals = {"cls_attention_1head:-1": attention[0], "keys:-1": k[0, 1:].unflatten(-1, (4, -1))}
    tokens = VisualTokens(hidden[0, 1:], Layout.grid(1, n), signals)
    selection = PruMerge(compat="published").select(tokens, count + 1)
    ours = selection.apply(tokens.features)
    nearest = torch.cdist(case["out_tokens"][0], ours, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
    assert nearest.values.max() < 1e-4
    assert sorted(nearest.indices.tolist()) == list(range(count + 1))
    assert torch.isin(kept[0], selection.indices).all()
    assert int(selection.info["natural_count"]) == int(prumerge_count(attention)) + 1


def stream(n: int, seed: int = 0) -> VisualTokens:
    g = torch.Generator().manual_seed(seed)
    signals = {
        "cls_attention_1head:-1": torch.randn(n, generator=g).mul(2).softmax(0),
        "keys:-1": torch.randn(n, 2, 4, generator=g),
    }
    return VisualTokens(torch.randn(n, 6, generator=g), Layout.grid(1, n), signals)


def test_the_count_is_that_of_the_box_plot() -> None:
    attention = stream(500).signals["cls_attention_1head:-1"].view(2, 250)
    q1, q3 = np.percentile(attention.numpy(), [25, 75], axis=1)
    expected = (attention.numpy() > (q3 + 1.5 * (q3 - q1))[:, None]).sum(1)
    assert prumerge_count(attention).tolist() == expected.tolist()
    assert expected.min() > 0


def test_rows_add_up_to_one() -> None:
    tokens = stream(60)
    weights = PruMerge().select(tokens, 12).weights
    assert weights is not None
    rows = weights.dense(12, 60)
    torch.testing.assert_close(rows.sum(-1), torch.ones(12))
    constant = PruMerge().select(tokens, 12).apply(torch.full((60, 3), 7.0))
    torch.testing.assert_close(constant, torch.full((12, 3), 7.0))
    published = PruMerge(compat="published").select(tokens, 12).weights
    assert published is not None
    assert (published.dense(12, 60).sum(-1) - 1).abs().max() > 0.01


def test_each_kept_token_takes_its_nearest_and_the_last_one_the_rest() -> None:
    attention = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1]])
    keys = torch.tensor([[[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [0.5, 0.6]]])
    rows = prumerge_rows(attention, keys, torch.tensor([[0, 1]]), 1, "published")[0]
    torch.testing.assert_close(rows, torch.tensor([[1, 0, 0.1, 0, 0], [0, 1, 0, 0.1, 0], [0, 0, 0.1, 0.1, 0.1]]))


@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_fewer_tokens_than_neighbours(n: int) -> None:
    """The published code fails below 33 tokens."""
    tokens = stream(n)
    for keep in range(1, n + 1):
        selection = PruMerge().select(tokens, keep)
        assert len(selection.indices.unique()) == keep
        assert torch.isfinite(selection.apply(tokens.features)).all()


def test_an_even_image_still_gets_its_budget() -> None:
    """No token stands out: the published code returns the pooled token alone."""
    tokens = stream(20)
    tokens.signals["cls_attention_1head:-1"].fill_(0.05)
    assert int(prumerge_count(tokens.signals["cls_attention_1head:-1"][None])) == 0
    selection = PruMerge().select(tokens, 5)
    assert selection.indices.tolist() == [0, 1, 2, 3, 4]
    assert int(selection.info["natural_count"]) == 1
    tokens.signals["cls_attention_1head:-1"].fill_(0.0)
    torch.testing.assert_close(PruMerge().select(tokens, 5).apply(torch.ones(20, 2)), torch.ones(5, 2))


def test_tiles_do_not_mix() -> None:
    g = torch.Generator().manual_seed(7)
    signals = {"cls_attention_1head:-1": torch.rand(40, generator=g), "keys:-1": torch.randn(40, 1, 4, generator=g)}
    tokens = VisualTokens(torch.zeros(40, 2), Layout.grid(4, 5, 2, "tiles"), signals)
    selection = PruMerge().select(tokens, 9)
    assert selection.weights is not None
    rows = selection.weights.dense(9, 40)
    own = tokens.layout.group[selection.indices]
    assert torch.bincount(own).tolist() == [5, 4]
    assert not rows[own[:, None] != tokens.layout.group[None]].any()
