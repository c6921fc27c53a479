"""DivPrune against the published choice, its exact rule, and the inputs that break the published code."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.budget import kept
from tokprune.methods.connector.divprune import DivPrune, divprune
from tokprune.tokens import Layout, VisualTokens


@claims("divprune", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features = case["features"]
    if "order_upstream" in case:  # documents the published defect: repeated features are picked twice
        upstream = case["order_upstream"]
        assert kept(len(features), case.number("ratio")) == len(upstream)
        order = divprune(features[None], len(upstream))[0]
        distinct = torch.unique(features, dim=0)
        assert len(set(upstream.tolist())) == len(distinct) < len(upstream)
        assert len(set(order.tolist())) == len(upstream)
        fresh = len(distinct)
        assert torch.unique(features[order[:fresh]], dim=0).shape[0] == fresh
        assert set(order[:fresh].tolist()) == set(upstream[:fresh].tolist())
        return
    expected = case["kept_sorted"]
    exact = len(features) * case.number("ratio")
    assert len(expected) == (round(exact) if exact % 1 == 0.5 else kept(len(features), case.number("ratio")))
    order = divprune(features[None], len(expected))[0]
    assert torch.equal(order.sort().values, expected)
    if "order" in case:
        assert torch.equal(order, case["order"])
    chosen = DivPrune().select(VisualTokens(features, Layout.line(len(features))), len(expected))
    assert torch.equal(chosen.indices, expected.sort().values)


def brute_force(features: torch.Tensor, keep: int) -> list[int]:
    """The rule word by word in float64."""
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    distance = (1 - x @ x.T).tolist()
    n = len(distance)
    chosen = [max(range(n), key=lambda i: (min((distance[i][j] for j in range(n) if j != i), default=0.0), -i))]
    while len(chosen) < keep:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return chosen


def test_equals_the_rule_written_out() -> None:
    features = torch.randn(3, 24, 6, generator=torch.Generator().manual_seed(5))
    order = divprune(features, 24)
    for row, picks in zip(features, order.tolist(), strict=True):
        assert picks[:20] == brute_force(row, 20)
        assert sorted(picks) == list(range(24))


def test_scale_of_features_does_not_matter() -> None:
    features = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(6))
    stretched = features * torch.linspace(0.01, 100, 40)[None, :, None]
    assert torch.equal(divprune(features, 12), divprune(stretched, 12))


def test_a_zero_token_breaks_nothing() -> None:
    features = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(7))
    features[0, 3] = 0
    assert len(set(divprune(features, 12)[0].tolist())) == 12
