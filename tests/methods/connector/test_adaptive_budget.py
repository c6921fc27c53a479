"""AdaptiveBudget: what counts as information, exact sums, and a wrapper that gets out of the way."""

from __future__ import annotations

import pytest
import torch

from tokprune.config import method_from_dict, method_to_dict
from tokprune.errors import OptionError
from tokprune.methods.connector.cdpruner import CDPruner
from tokprune.methods.connector.divprune import DivPrune
from tokprune.methods.connector.wrappers.adaptive_budget import AdaptiveBudget, distinct_tokens
from tokprune.registry import get_method
from tokprune.tokens import Layout, VisualTokens


def image(n: int, kinds: int, seed: int = 0) -> VisualTokens:
    """n tokens of `kinds` different sorts, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randn(kinds, 32, generator=generator)
    x = palette[torch.arange(n) % kinds] + 0.01 * torch.randn(n, 32, generator=generator)
    return VisualTokens(x, Layout.line(n))


def test_distinct_tokens() -> None:
    zero = torch.zeros(6)
    assert distinct_tokens(torch.ones(10, 6), zero).item() == pytest.approx(1)
    assert distinct_tokens(torch.eye(6), zero).item() == pytest.approx(6)
    assert distinct_tokens(torch.eye(6).repeat(4, 1), zero).item() == pytest.approx(6)  # N > D
    assert distinct_tokens(torch.eye(6)[:3].repeat(1, 1), zero).item() == pytest.approx(3)
    assert distinct_tokens(torch.zeros(5, 6), zero).item() == pytest.approx(1)
    away = torch.full((6,), 3.0)
    assert distinct_tokens(away + torch.eye(6), away).item() == pytest.approx(6)  # directions are those from the origin
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    assert distinct_tokens(x, torch.zeros(50)).item() == pytest.approx(1 / cosine.square().mean().item(), rel=1e-4)


def test_busy_images_get_more() -> None:
    plain, busy = image(100, 1), image(100, 20)
    found = AdaptiveBudget().budgets([plain, busy], [20, 20])
    assert sum(found) == 40
    assert found[1] > 1.5 * found[0]
    assert found[0] >= 5  # a quarter of its fair share
    assert AdaptiveBudget(least=1).budgets([plain, busy], [20, 20]) == [20, 20]


def test_resolution_counts() -> None:
    small, large = image(50, 8, seed=1), image(200, 8, seed=2)
    by_size = AdaptiveBudget(density=0, least=0).budgets([small, large], [25, 25])
    assert by_size == [11, 39]  # one each, and 48 as 1 : 4
    assert AdaptiveBudget().budgets([small, large], [25, 25])[1] > 25


def test_bounds_and_sums() -> None:
    batch = [image(3, 1), image(64, 64), image(7, 7), image(30, 2)]
    for keeps in ([1, 1, 1, 1], [3, 64, 7, 30], [3, 1, 1, 2], [1, 60, 5, 3]):
        found = AdaptiveBudget().budgets(batch, keeps)
        assert sum(found) == sum(keeps)
        assert all(1 <= got <= len(t) for got, t in zip(found, batch, strict=True))
    assert AdaptiveBudget().budgets(batch[:1], [2]) == [2]


def test_it_wraps_any_method() -> None:
    tokens = image(30, 10)
    assert torch.equal(AdaptiveBudget().select(tokens, 7).indices, DivPrune().select(tokens, 7).indices)
    wrapped = AdaptiveBudget(method=CDPruner(relevance="clip"))
    assert wrapped.needs == ("clip_image", "clip_text")
    assert wrapped.query_aware
    assert not AdaptiveBudget().query_aware
    assert AdaptiveBudget(method="divprune") == AdaptiveBudget()
    assert get_method("adaptive_budget", method="textmonkey").method == get_method("textmonkey")  # type: ignore[attr-defined]
    assert method_from_dict(method_to_dict(wrapped)) == wrapped


def test_refusals() -> None:
    with pytest.raises(OptionError, match="wraps a connector method"):
        AdaptiveBudget(method=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="density"):
        AdaptiveBudget(density=2)
