"""EViT's and ATS's arithmetic against the published functions; their blocks as whole models are in
test_golden_models.py."""

from __future__ import annotations

import math

import pytest
import torch

from tests.encoder.blocks import block
from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.encoder.ats import ATS, inverse_transform_sample, significance
from tokprune.methods.encoder.evit import EViT, attentive

close = torch.testing.assert_close


@claims("evit_block", anchor="cls_attn", part="the choice inside the block")
def test_evit_choice(case: GoldenCase) -> None:
    attention = case["cls_attn"]
    n, (_, share, _, tokens) = attention.shape[1], case["cfg"].tolist()
    keep = int(tokens) if tokens > 0 else math.ceil(share * n)
    assert keep == case.number("left_tokens")
    kept, dropped = attentive(attention, keep)
    if keep < n:
        assert torch.equal(kept, case["idx"])
        assert torch.equal(dropped, case["complement"])


STEPS = "a step of the published sampler; ours comes to the same tokens another way"


@claims("ats_sampler", anchor="attn", unused={"normalized_cdf": STEPS, "ys": STEPS, "sampler": STEPS})
def test_ats_sampling(case: GoldenCase) -> None:
    attention, v = case["attn"], case["v"]
    scores = significance(attention[:, :, 0, 1:], v[:, :, 1:].square().sum((1, 3)).sqrt())
    close(scores.sort(-1).values, case["sorted_scores"], atol=1e-6, rtol=1e-6)
    close(scores.gather(-1, case["sorted_indices"]), case["sorted_scores"], atol=1e-6, rtol=1e-6)
    patches, hit = inverse_transform_sample(scores, int(case.number("n_ref")))
    x = case["raw_x"]
    rows = x[:, 1:].gather(1, patches[..., None].expand(-1, -1, x.shape[2])) * hit[..., None]
    expected, count = case["selected_x"], hit.sum(1) + 1
    if "policy" in case:
        assert torch.equal(count, case["policy"].sum((1, 2)).long())
    close(expected[:, 1 : rows.shape[1] + 1], rows)
    close(expected[:, 0], x[:, 0])
    index = patches[:, None, :, None].expand(-1, attention.shape[1], -1, attention.shape[3])
    rows = attention[:, :, 1:].gather(2, index) * hit[:, None, :, None]
    close(case["attn_selected"][:, :, 1 : rows.shape[2] + 1], rows)


def test_ats_padding_does_not_count() -> None:
    scores = torch.rand(1, 9, generator=torch.Generator().manual_seed(1)) + 0.1
    alone, hit = inverse_transform_sample(scores, 7)
    padded = torch.cat([scores, torch.full((1, 3), 0.5)], 1)
    real = torch.arange(12)[None] < 9
    among, also = inverse_transform_sample(padded, 7, real)
    assert torch.equal(alone, among)
    assert torch.equal(hit, also)


def test_ats_flat_scores_drop_only_the_lowest() -> None:
    patches, hit = inverse_transform_sample(torch.full((1, 8), 0.125), 9)
    assert patches[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert hit.all()


@pytest.mark.parametrize("kept", [[0], [0, 1, 2]])
def test_ats_never_takes_padding(kept: list[int]) -> None:
    """Also where one patch is left, or scores are zero, so that the curve does not rise."""
    scores = torch.zeros(2, 5)
    scores[0, kept] = 1.0 / len(kept)
    real = torch.zeros(2, 5, dtype=torch.bool)
    real[:, kept] = True
    patches, hit = inverse_transform_sample(scores, 6, real)
    for row in range(2):
        assert hit[row].any()
        assert set(patches[row, hit[row]].tolist()) <= set(kept)


def test_ats_takes_one_step_less_than_samples() -> None:
    """The first step is at the least value of the curve above 0, which is the second lowest score."""
    scores = torch.tensor([[0.4, 0.1, 0.2, 0.3]])
    for samples, expected in ((2, [2]), (3, [2, 0]), (9, [2, 3, 0])):
        patches, hit = inverse_transform_sample(scores, samples)
        assert patches[0, hit[0]].tolist() == expected


def test_ats_samples_two_patches_and_spares_one() -> None:
    cut = ATS().reduce(block(2))
    assert cut is not None
    assert cut.rep.shape == (2, 2)
    assert ATS().reduce(block(1)) is None


def test_ats_counts_no_padding_but_as_published() -> None:
    size = torch.ones(2, 8, 1)
    size[0, 5:] = 0
    for compat, most in (("corrected", 4), ("published", 7)):
        cut = ATS(compat=compat).reduce(block(7, size=size))
        assert cut is not None
        assert cut.rep[0].max() <= most
    assert cut.rep[0].max() > 4


@pytest.mark.parametrize(("index", "left"), [(3, 14), (6, 10), (9, 7)])
def test_evit_joins_what_it_drops_to_one_patch_of_the_target(index: int, left: int) -> None:
    """20 patches to 7 in three steps of one factor; one of them stands for the others."""
    method = EViT()
    view = block(20, target=7, index=index)
    cut = method.reduce(view)
    assert cut is not None
    attention = view.cls_attention().mean(1)
    kept, dropped = attentive(attention, left - 1)
    assert torch.equal(cut.rep[:, 1:-1], kept.sort(-1).values + 1)
    best = torch.stack([d[a[d].argmax()] for a, d in zip(attention, dropped, strict=True)])
    assert torch.equal(cut.rep[:, -1], best + 1)
    assert cut.size[:, -1, 0].tolist() == [20 - left + 1] * 2
    assert ((cut.assign == left) == ~torch.isin(torch.arange(21), cut.rep[0, :-1])).all(1)[0]
    unfused = EViT(fuse=False).reduce(view)
    assert unfused is not None
    assert torch.equal(unfused.rep[:, 1:], attentive(attention, left)[0].sort(-1).values + 1)


def test_evit_keeps_the_best_patch_alone_where_a_budget_leaves_one() -> None:
    view = block(6, target=1)
    cut = EViT(blocks=(3,)).reduce(view)
    assert cut is not None
    assert torch.equal(cut.rep[:, 1], view.cls_attention().mean(1).argmax(1) + 1)
    assert cut.rep.shape == (2, 2)  # [CLS], and no row for the others
