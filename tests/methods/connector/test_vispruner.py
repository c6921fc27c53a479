"""VisPruner against the published masks, and the residual counts on which the published code crashes."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.methods.connector.vispruner import VisPruner, vispruner
from tokprune.tokens import Layout, VisualTokens


@claims("vispruner", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features, rows, expected = case["features"], case["cls_attn"], case["kept_sorted"]
    keep, ratio = case.number("T"), case.number("important_ratio")
    chosen = vispruner(features, rows.mean(1), keep, ratio)
    assert torch.equal(chosen, expected)
    assert torch.equal(torch.zeros_like(case["mask"]).scatter(1, chosen, 1), case["mask"])
    tiles, n = features.shape[:2]
    signals = {"encoder_features": features.flatten(0, 1), "cls_attention": rows.mean(1).flatten()}
    tokens = VisualTokens(torch.zeros(tiles * n, 2), Layout.grid(1, n, groups=tiles, kind="tiles"), signals)
    selection = VisPruner(important_ratio=ratio).select(tokens, tiles * keep)
    assert torch.equal(selection.indices, (expected + torch.arange(tiles)[:, None] * n).flatten())


def rule(features: torch.Tensor, attention: torch.Tensor, keep: int, ratio: float, step: int) -> list[int]:
    """The rule word by word on Python lists."""
    x = torch.nn.functional.normalize(features.double(), dim=-1)
    cosine = (x @ x.T).tolist()
    order = sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))
    important = int(keep * ratio)
    rest = order[important:]
    while len(rest) > keep - important:
        even, odd = rest[0::2], rest[1::2]
        most = {a: max(cosine[a][b] for b in odd) for a in even}
        ranked = sorted(even, key=lambda a: -most[a])
        rest = ranked[min(step, len(rest) - keep + important, len(even)) :] + odd
    return sorted(order[:important] + rest)


@pytest.mark.parametrize(
    ("n", "keep", "ratio"), [(576, 58, 0.5), (61, 16, 0.5), (40, 7, 0.25), (9, 2, 0.5), (9, 1, 0.5)]
)
def test_odd_residual_counts(n: int, keep: int, ratio: float) -> None:
    """58 of 576 at 0.5 is an IndexError in the published code."""
    g = torch.Generator().manual_seed(n)
    features, attention = torch.randn(1, n, 16, generator=g).double(), torch.rand(1, n, generator=g)
    chosen = vispruner(features, attention, keep, ratio)
    assert chosen[0].tolist() == rule(features[0], attention[0], keep, ratio, 8)


def test_duplicates_go_first() -> None:
    features = torch.eye(8).repeat_interleave(2, 0)[None]  # tokens 2i and 2i+1 are the same
    attention = torch.linspace(1, 0.5, 16)[None]
    chosen = vispruner(features, attention, 8, 0.0)
    assert sorted(chosen[0].div(2, rounding_mode="floor").tolist()) == list(range(8))


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"important_ratio=1\.5"):
        VisPruner(important_ratio=1.5)
    with pytest.raises(OptionError, match="step=0"):
        VisPruner(step=0)
