"""PiToMe, ToFu and the attention graph of Zero-TPrune against published functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.encoder.blocks import block
from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.encoder.pitome import PiToMe, energy, energy_matching
from tokprune.methods.encoder.tofu import ToFu, norm_merge
from tokprune.methods.encoder.zerotprune import (
    ZeroTPrune,
    head_consensus,
    importance,
    similar_half,
    weighted_page_rank,
)
from tokprune.ops import blocks
from tokprune.ops.merge import Matching, bipartite_matching, merge, merge_weighted

Merged = Callable[[Matching, Tensor], tuple[Tensor, Tensor]]
close = torch.testing.assert_close
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


@claims("extra_pitome", anchor="energy")
def test_pitome(case: GoldenCase) -> None:
    ratio, cls, margin, alpha, bipartite = case["cfg"].tolist()
    metric, prefix = case["metric"], int(cls)
    close(energy(metric[:, prefix:], margin, alpha), case["energy"], **TOLERANCE)
    patches = metric.shape[1] - prefix
    r = int(patches - patches * ratio) if ratio < 1 else 0
    matching = energy_matching(metric, r, margin, prefix, bool(bipartite), alpha)
    value, size = merge_weighted(matching, case["x"], case["size_in"])
    close(value, case["wavg_x"], **TOLERANCE)
    close(size, case["wavg_size"])
    close(merge(matching, case["x"]), case["mean_x"], **TOLERANCE)


@claims("extra_pitome", anchor="mode")
def test_tofu_copy(case: GoldenCase) -> None:
    ratio, cls = case["cfg"].tolist()
    metric, x, prefix = case["metric"], case["x"], int(cls)
    patches = metric.shape[1] - prefix
    matching = bipartite_matching(metric, int(patches - patches * ratio), prefix)
    mode = str(case.array("mode"))
    if mode == "prune":
        out = x.gather(1, matching.rep[..., None].expand(-1, -1, x.shape[2]))
    else:
        out = merge(matching, x) if mode == "mean" else norm_merge(matching, x, by_destination=True)[0]
    close(out, case["y"], **TOLERANCE)


@claims("extra_pitome", anchor="scores")
def test_page_rank(case: GoldenCase) -> None:
    temperature, rounds = case["cfg"].tolist()
    scores = case["scores"]
    attention = (scores / temperature).softmax(-1)
    close(head_consensus(weighted_page_rank(attention, int(rounds)))[:, 1:], case["em"], **TOLERANCE)
    close(attention.mean(-2).square().mean(1).sqrt()[:, 1:], case["ave_em"], **TOLERANCE)
    mean = (scores.mean(1) / temperature).softmax(-1)
    close(weighted_page_rank(mean, 5)[:, 1:], case["mean5"], **TOLERANCE)


def test_norm_merge_keeps_the_longest_norm() -> None:
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    matching = bipartite_matching(x, 2)
    out, size = norm_merge(matching, x)
    for row in range(out.shape[1]):
        members = x[0, matching.assign[0] == row]
        close(out[0, row].norm(), members.norm(dim=-1).max())
        assert size[0, row] == len(members)


@pytest.mark.parametrize("merged", [merge_weighted, norm_merge])
def test_merged_rows_carry_the_gradient_of_all_that_went_into_them(merged: Merged) -> None:
    x = torch.randn(1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    matching = bipartite_matching(x, 2)
    assert torch.autograd.gradcheck(lambda y: merged(matching, y)[0], x)


def test_head_filter_ignores_flat_heads_and_falls_back_to_all() -> None:
    flat, sharp = torch.full((4,), 0.25), torch.tensor([0.1, 0.2, 0.3, 0.4])
    both = torch.stack([flat, sharp])[None]
    close(head_consensus(both, low=0.01)[0], sharp)
    close(head_consensus(both, low=5.0), head_consensus(both))


def test_similar_tokens_of_the_unimportant_half_go() -> None:
    metric = torch.eye(6)[None].clone()
    metric[0, 4] = metric[0, 1]  # token 4 repeats token 1
    worth = torch.tensor([[0.3, 0.9, 0.8, 0.7, 0.2, 0.1]])
    assert similar_half(worth, metric, 1)[0].tolist() == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(("index", "halves"), [(0, True), (5, True), (6, False), (11, False)])
def test_pitome_merges_by_energy_in_the_second_half_of_the_blocks(index: int, halves: bool) -> None:
    """The margin falls from 0.75 to 0, a block leaves 0.9125 of its patches: of 64 go 5.6, cut off to 5."""
    view = block(64, index=index)
    expected = energy_matching(view.metric(), 5, 0.75 * (1 - index / 12), 1, halves)
    other = energy_matching(view.metric(), 5, 0.75 * (1 - index / 12), 1, not halves)
    assert not torch.equal(expected.rep, other.rep)
    cut = PiToMe().reduce(view)
    assert cut is not None
    assert torch.equal(cut.rep, expected.rep)
    assert torch.equal(cut.assign, expected.assign)
    for variant, matching in (("bipartite", True), ("energy", False)):
        cut = PiToMe(variant=variant).reduce(view)
        assert cut is not None
        assert torch.equal(cut.rep, (expected if halves is matching else other).rep)


def test_pitome_ranks_by_an_energy_of_its_alpha() -> None:
    """Without a penalty below the margin, energy counts near neighbours alone."""
    view = block(40, index=11)
    flat, steep = (PiToMe(alpha=alpha, keep=0.8).reduce(view) for alpha in (0.0, 3.0))
    assert flat is not None
    assert steep is not None
    assert not torch.equal(flat.rep, steep.rep)
    for cut, alpha in ((flat, 0.0), (steep, 3.0)):
        assert torch.equal(cut.rep, energy_matching(view.metric(), 8, 0.75 / 12, 1, alpha=alpha).rep)


def test_tofu_drops_before_its_switch_and_merges_from_it_on() -> None:
    for index, merges in ((5, False), (6, True)):
        view = block(16, index=index)
        matching = bipartite_matching(view.metric(), 3, 1)
        cut = ToFu(r=3).reduce(view)
        assert cut is not None
        kept = view.x.gather(1, matching.rep[..., None].expand(-1, -1, 8))
        close(cut.x, norm_merge(matching, view.x)[0] if merges else kept)
        assert bool((cut.assign >= 0).all()) == merges
        assert ToFu(r=(3,) * 6 + (0,) * 6).active(index, 12) is not merges
    assert ToFu(r=(3, 0)).reduce(block(16, index=1)) is None
    counts = [
        16 - (0 if cut is None else 17 - cut.rep.shape[1])
        for cut in (ToFu().reduce(block(16, 4, i)) for i in range(12))
    ]
    assert counts == [15] * 12  # 12 of 16 go, one a block


def test_zerotprune_leaves_its_share_and_asks_the_similarity_first() -> None:
    """Of 20 patches 16 stay; 0.3 of the 4 that go are similar, rounded down."""
    view = block(20, index=3)
    attention = view.attention()
    first = importance(attention, 1, 1, 0.01, 0.7)[:, 1:]
    left = similar_half(first, view.metric()[:, 1:], 1)
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), left + 1], 1)
    for rounds in ((30, 10, 1), (2,)):
        cut = ZeroTPrune(rounds=rounds).reduce(view)
        assert cut is not None
        for b in range(2):
            graph = attention[b][:, rows[b]][:, :, rows[b]]
            graph = graph / graph.sum(-1, keepdim=True)
            worth = importance(graph[None], rounds[0], 1, 0.01, 0.7)[0, 1:]
            assert cut.rep[b].tolist() == [0, *(left[b][worth.topk(16).indices.sort().values] + 1).tolist()]
    deep = ZeroTPrune().reduce(block(20, target=10, index=9))
    assert deep is not None
    assert deep.rep.shape == (2, 11)
    assert ZeroTPrune().reduce(block(20, target=20, index=9)) is None
    assert ZeroTPrune(keep=1.0).reduce(view) is None
    plain = importance(attention, 1, 0, None, None)
    weighted = importance(attention, 1, 1, None, None)
    start = torch.ones(21)
    start[0] = 21**0.5
    close(weighted, (start / start.sum() @ attention).square().mean(1).sqrt())
    close(plain, attention.mean(2).square().mean(1).sqrt())


def test_energy_is_the_same_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(7))
    once = energy(metric, 0.3, 0.5)
    cosine = torch.cosine_similarity(metric[:, :, None], metric[:, None], dim=-1)
    close(once, torch.where(cosine > 0.3, cosine - 0.3, 0.5 * (cosine - 0.3).expm1()).mean(-1))
    monkeypatch.setattr(blocks, "WHOLE", 4)
    monkeypatch.setattr(blocks, "ROWS", 3)
    close(energy(metric, 0.3, 0.5), once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norms_are_as_exact_as_the_tokens(dtype: torch.dtype) -> None:
    """Of halves in float32, of float64 as they are."""
    x = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(8)).to(dtype)
    matching = bipartite_matching(x, 5)
    out, _ = norm_merge(matching, x)
    assert out.dtype == dtype
    for row in range(7):
        members = x[0, matching.assign[0] == row].double()
        mean = members.mean(0).to(dtype).double()
        expected = mean if len(members) == 1 else mean * (members.norm(dim=-1).max() / mean.norm())
        close(out[0, row], expected.to(dtype), atol=0, rtol=0.004 if dtype == torch.bfloat16 else 1e-14)
