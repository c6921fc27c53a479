"""EViT's and ATS's arithmetic against the published functions; their blocks as whole models are in
test_golden_models.py."""

from __future__ import annotations

import math

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.encoder.ats import inverse_transform_sample, significance
from tokprune.methods.encoder.evit import attentive

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
