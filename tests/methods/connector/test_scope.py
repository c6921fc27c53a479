"""SCOPE against the published order and the rule written out."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.connector.scope import Scope, scope
from tokprune.tokens import Layout, VisualTokens


@claims("scope", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features, attention, expected = case["features"], case["cls_attn_headsum"], case["kept_sorted"]
    keep = case.number("K")
    order = scope(features, attention, keep)
    assert torch.equal(order, case["order"])
    tiles, n = attention.shape
    signals = {"encoder_features": features.flatten(0, 1), "cls_attention": attention.flatten()}
    tokens = VisualTokens(torch.zeros(tiles * n, 2), Layout.grid(1, n, groups=tiles, kind="tiles"), signals)
    chosen = Scope().select(tokens, tiles * keep).indices
    assert torch.equal(chosen, (expected + torch.arange(tiles)[:, None] * n).flatten())


def rule(features: torch.Tensor, attention: torch.Tensor, keep: int, alpha: float) -> list[int]:
    """The rule word by word in float64."""
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine = (x @ x.T).tolist()
    n = len(cosine)
    cover, order = [0.0] * n, []
    for _ in range(keep):
        gain = [
            float(attention[j]) ** alpha * sum(max(0.0, cosine[i][j] - cover[i]) for i in range(n)) for j in range(n)
        ]
        pick = max((j for j in range(n) if j not in order), key=lambda j: (gain[j], -j))
        order.append(pick)
        cover = [max(c, s) for c, s in zip(cover, cosine[pick], strict=True)]
    return order


def test_equals_the_rule_written_out() -> None:
    g = torch.Generator().manual_seed(3)
    features, attention = torch.randn(2, 30, 5, generator=g), torch.rand(2, 30, generator=g)
    for alpha in (1.0, 0.0, 2.0):
        ours = scope(features.double(), attention.double(), 10, alpha)
        for row in range(2):
            assert ours[row].tolist() == rule(features[row], attention[row], 10, alpha)


def test_a_factor_on_the_attention_does_not_matter() -> None:
    g = torch.Generator().manual_seed(4)
    features, attention = torch.randn(1, 30, 5, generator=g), torch.rand(1, 30, generator=g)
    assert torch.equal(scope(features, attention, 12), scope(features, attention / 16, 12))


def test_the_budget_is_exact_over_tiles() -> None:
    """Five tiles, 23 tokens: the published code keeps 4 in each."""
    signals = {"encoder_features": torch.randn(45, 6), "cls_attention": torch.rand(45)}
    layout = Layout.grid(3, 3, groups=5, kind="tiles")
    indices = Scope().select(VisualTokens(torch.zeros(45, 2), layout, signals), 23).indices
    assert torch.bincount(layout.group[indices]).tolist() == [5, 5, 5, 4, 4]
