"""PruMerge+ against the published tokens, and samples that reach over the whole image at any budget."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.attention import cls_row
from tests.published.prumerge_plus import prumerge_plus_order, spatial_step
from tokprune.methods.connector.prumerge import prumerge_count, prumerge_rows
from tokprune.methods.connector.prumerge_plus import PruMergePlus, fill_evenly, fill_strided
from tokprune.tokens import Layout, VisualTokens


@claims("prumergeplus", anchor="hidden_states")
def test_golden(case: GoldenCase) -> None:
    hidden, k = case["hidden_states"], case["k"]
    attention = cls_row(case["q"], k, heads=1)[:, 0]
    torch.testing.assert_close(attention, case["cls_attn"], atol=1e-6, rtol=1e-4)
    n = attention.shape[1]
    count = int(prumerge_count(attention))
    assert count == case.number("num_topk")
    assert count / n == pytest.approx(case.number("ratio"), rel=1e-6)
    step = spatial_step(n, count)
    assert step == case.number("spatial_step")
    order = prumerge_plus_order(attention[0], count, step)
    assert torch.equal(order, case["kept_order"])
    rows = prumerge_rows(attention, k[:, 1:], order[None], compat="published")
    torch.testing.assert_close(rows @ hidden[:, 1:], case["out_tokens"], atol=1e-5, rtol=1e-5)
    assert int(PruMergePlus().natural(attention)) == case["out_tokens"].shape[1]


def stream(n: int, outstanding: int) -> VisualTokens:
    """The first `outstanding` tokens stand out."""
    g = torch.Generator().manual_seed(n)
    attention = torch.rand(n, generator=g) * 0.1 + 0.5
    attention[:outstanding] += 5.0
    signals = {"cls_attention_1head:-1": attention, "keys:-1": torch.randn(n, 1, 8, generator=g)}
    return VisualTokens(torch.randn(n, 4, generator=g), Layout.grid(1, n), signals)


def test_the_samples_reach_the_end_of_the_image() -> None:
    tokens = stream(576, 30)
    published = PruMergePlus(compat="published").select(tokens, 65).indices
    assert published.max() < 360  # cut off when full
    corrected = PruMergePlus().select(tokens, 65).indices
    assert set(range(30)) <= set(corrected.tolist())
    gaps = corrected[30:64].diff()  # the last slot may be the pooled token's
    assert corrected.max() > 550
    assert gaps.max() <= 18


def test_the_port_takes_every_eighth_token_until_it_is_full() -> None:
    taken = torch.arange(24)[None] < 4
    assert fill_strided(taken, torch.tensor([[2]]), 3).nonzero()[:, 1].tolist() == [8, 16]
    assert fill_strided(taken, torch.tensor([[1]]), 3).nonzero()[:, 1].tolist() == [8]
    assert fill_strided(taken, torch.tensor([[3]]), 20).nonzero()[:, 1].tolist() == [4, 5, 6]


def test_the_last_patch_is_no_sample() -> None:
    """Nothing stands out: every 20th of 61 tokens is a sample, but the published slice ends in front of the last."""
    assert PruMergePlus().natural(torch.full((1, 61), 0.1)).tolist() == [4]  # 0, 20, 40 and the pooled one


def test_more_outstanding_tokens_than_the_budget() -> None:
    tokens = stream(100, 20)
    attention = tokens.signals["cls_attention_1head:-1"]
    indices = PruMergePlus().select(tokens, 8).indices
    assert torch.isin(attention.topk(7).indices, indices).all()


def test_no_outstanding_token_is_no_division_by_zero() -> None:
    tokens = stream(60, 0)
    tokens.signals["cls_attention_1head:-1"].fill_(0.1)
    for compat in ("corrected", "published"):
        for keep in (1, 2, 7, 59, 60):
            selection = PruMergePlus(compat=compat).select(tokens, keep)  # type: ignore[arg-type]
            assert len(selection.indices.unique()) == keep
    assert int(selection.info["natural_count"]) == 4  # 0, 20, 40 and the pooled one


@pytest.mark.parametrize("free", [1, 2, 7, 10])
def test_even_samples_are_exact_and_centred(free: int) -> None:
    taken = torch.ones(1, 12, dtype=torch.bool)
    taken[0, torch.randperm(12, generator=torch.Generator().manual_seed(free))[:free]] = False
    for missing in range(free + 1):
        chosen = fill_evenly(taken, torch.tensor([[missing]]))
        assert int(chosen.sum()) == missing
        assert not (chosen & taken).any()
    nothing = torch.zeros(1, 9, dtype=torch.bool)
    assert fill_evenly(nothing, torch.tensor([[1]])).nonzero()[:, 1].tolist() == [4]
    assert fill_evenly(nothing, torch.tensor([[3]])).nonzero()[:, 1].tolist() == [1, 4, 7]
