"""CATP: its objective, and budgets that move to the image that has more to say."""

from __future__ import annotations

import pytest
import torch

from tokprune.budget import pooled_budgets
from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.connector.catp import CATP, catp
from tokprune.tokens import Layout, Query, VisualTokens

WORDS = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))


def image(n: int = 40, spread: float = 1.0, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 8, generator=generator) + spread * torch.randn(n, 8, generator=generator)
    return VisualTokens(x, Layout.line(n), query=Query("a red car", WORDS))


def test_greedy_on_the_objective() -> None:
    x = image(18).features.double()
    sim = (1 + torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)) / 2
    near = (1 + torch.nn.functional.cosine_similarity(x, WORDS.double().mean(0)[None], dim=-1)) / 2

    def objective(chosen: list[int]) -> float:
        return (sim[:, chosen].max(1).values.sum() + 0.7 * near[chosen].sum()).item() if chosen else 0.0

    chosen: list[int] = []
    added: list[float] = []
    for _ in range(7):
        gain = {j: objective([*chosen, j]) - objective(chosen) for j in range(18) if j not in chosen}
        chosen.append(max(gain, key=gain.__getitem__))
        added.append(gain[chosen[-1]])
    order, gains = catp(x, WORDS, 7)
    assert order.tolist() == chosen
    torch.testing.assert_close(gains, torch.tensor(added, dtype=gains.dtype))
    assert CATP().select(image(18), 7).indices.tolist() == sorted(chosen)


def test_the_varied_image_gets_more() -> None:
    plain, varied = image(spread=0.05, seed=1), image(spread=2.0, seed=2)
    first, second = CATP().budgets([plain, varied], [10, 10])
    assert first + second == 20
    assert first < 10 < second
    assert CATP().budgets([varied, plain], [10, 10]) == [second, first]


def test_bounds_and_sums() -> None:
    batch = [image(5, 0.0), image(40, 2.0), image(3, 0.0), image(40, 1.0)]
    for keeps in ([5, 40, 3, 40], [1, 1, 1, 1], [2, 20, 1, 13], [1, 39, 3, 1]):
        found = CATP().budgets(batch, keeps)
        assert sum(found) == sum(keeps)
        for n, keep, got in zip((5, 40, 3, 40), keeps, found, strict=True):
            assert 1 <= got <= min(n, 2 * keep)
    assert CATP(stretch=1).budgets(batch, [2, 20, 1, 13]) == [2, 20, 1, 13]
    assert CATP().budgets(batch[:1], [3]) == [3]


def test_pooled_budgets() -> None:
    assert pooled_budgets([torch.tensor([9.0, 5.0, 1.0]), torch.tensor([0.1, 0.05])], 3) == [2, 1]
    assert pooled_budgets([torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])], 3) == [2, 1]


def test_refusals() -> None:
    with pytest.raises(MissingQueryError):
        CATP().select(VisualTokens(torch.randn(4, 8), Layout.line(4)), 2)
    with pytest.raises(OptionError, match="stretch"):
        CATP(stretch=0.5)
