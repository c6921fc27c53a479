"""PiToMe, ToFu and the attention graph of Zero-TPrune against published functions."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.encoder.pitome import energy, energy_matching
from tokprune.methods.encoder.tofu import norm_merge
from tokprune.methods.encoder.zerotprune import head_consensus, similar_half, weighted_page_rank
from tokprune.ops.merge import bipartite_matching, merge, merge_weighted

close = torch.testing.assert_close
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


@claims("extra_pitome", anchor="energy")
def test_pitome(case: GoldenCase) -> None:
    ratio, cls, margin, alpha, bipartite = case["cfg"].tolist()
    metric, prefix = case["metric"], int(cls)
    close(energy(metric[:, prefix:], margin, alpha), case["energy"], **TOLERANCE)
    patches = metric.shape[1] - prefix
    r = int(patches - patches * ratio) if ratio < 1 else 0
    matching = energy_matching(metric, r, margin, prefix, bool(bipartite))
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


def test_head_filter_ignores_flat_heads_and_falls_back_to_all() -> None:
    flat, sharp = torch.full((4,), 0.25), torch.tensor([0.1, 0.2, 0.3, 0.4])
    both = torch.stack([flat, sharp])[None]
    close(head_consensus(both, low=0.01)[0], sharp)
    close(head_consensus(both, low=5.0), head_consensus(both))


def test_similar_tokens_of_the_unimportant_half_go() -> None:
    metric = torch.eye(6)[None].clone()
    metric[0, 4] = metric[0, 1]  # token 4 repeats token 1
    importance = torch.tensor([[0.3, 0.9, 0.8, 0.7, 0.2, 0.1]])
    assert similar_half(importance, metric, 1)[0].tolist() == [0, 1, 2, 3, 5]
