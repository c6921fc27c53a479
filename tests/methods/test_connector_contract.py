"""What every connector method promises, tried on every one that is registered; and that each promise can be broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch

from tests.methods.streams import LAYOUTS, changed, method_with_defaults, stream
from tokprune import registry
from tokprune.methods.base import ConnectorMethod, ScoreMethod
from tokprune.ops.topk import top
from tokprune.registry import list_methods, register_method
from tokprune.testing import contract
from tokprune.tokens import Selection, VisualTokens

METHODS = list_methods("connector")
every_method = pytest.mark.parametrize("name", METHODS)


@cache
def method(name: str) -> ConnectorMethod:
    return method_with_defaults(name)


@every_method
@pytest.mark.parametrize("promise", [*contract.ANY, *contract.CONNECTOR], ids=lambda promise: promise.__name__)
def test_promise(name: str, promise: Any) -> None:
    promise(method(name))
    assert method(name).info.name == name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_method
def test_on_a_gpu(name: str) -> None:
    for where in ("unpadded", "video"):
        here = stream(LAYOUTS[where], method(name).needs, seed=12)
        there = changed(here, lambda x: x.cuda())
        there = dataclasses.replace(there, layout=here.layout.to("cuda"))
        chosen = method(name).select(there, 17)
        assert chosen.indices.is_cuda
        contract.well_formed(method(name), chosen, there, 17)


# -- broken methods ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_names() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


@dataclass(frozen=True)
class Good(ScoreMethod):
    """Keeps the longest tokens."""

    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().norm(dim=-1) + tokens.signal("cls_attention").float()


class OneLess(Good):
    """Keeps one token less."""

    def choose(self, tokens: VisualTokens, scores: torch.Tensor, keep: int) -> torch.Tensor:
        return top(scores, max(1, keep - 1))


class Unsorted(Good):
    """By falling score."""

    def choose(self, tokens: VisualTokens, scores: torch.Tensor, keep: int) -> torch.Tensor:
        return scores.topk(keep).indices


class Dice(Good):
    """Random without a seed."""

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        return torch.rand(len(tokens)) + 0 * super().scores(tokens)


class Neighbours(Good):
    """Looks at the whole batch."""

    def select_batch(self, batch: Any, keeps: Any) -> list[Selection]:
        shift = sum(float(t.features.sum()) for t in batch)
        return [Selection(top((self.scores(t) * shift).sin(), k)) for t, k in zip(batch, keeps, strict=True)]


class Silent(Good):
    """Takes NaN for a number, and any count."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        keep = min(max(keep, 1), len(tokens))
        return Selection(top(self.scores(tokens).nan_to_num(0.0), keep))


class Writes(Good):
    """Normalises in place."""

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        with torch.no_grad():
            tokens.features.mul_(1 / 3)
        return super().scores(tokens)


class Forgets(Good):
    """Has a default for a signal that is missing."""

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.features.float().norm(dim=-1) + tokens.signals.get("cls_attention", torch.zeros(1)).float().sum()


class Reads(Good):
    """Says that it reads the question."""


class Shares(Good):
    """Loses tokens in the shares."""

    def budgets(self, batch: Any, keeps: Any) -> list[int]:
        return [max(1, k - 1) for k in keeps]


class HalfOnly(Good):
    """Computes in the dtype that it is given, which overflows."""

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        return (tokens.features * 1e4).to(torch.float16).norm(dim=-1).float() + 0 * tokens.signal(
            "cls_attention"
        ).float()


BROKEN = {
    OneLess: "keeps exactly what is asked",
    Unsorted: "keeps exactly what is asked",
    Dice: "depends on no neighbour and no chance",
    Neighbours: "depends on no neighbour and no chance",
    Silent: "refuses nan or does not read it",
    Writes: "leaves its inputs alone",
    Forgets: "names missing signals",
    Reads: "asks for the question only when it reads it",
    Shares: "shares a prompt out exactly",
    HalfOnly: "takes degenerate inputs",
}


def registered(cls: type[Good], **more: Any) -> Good:
    built = dataclass(frozen=True)(type(cls.__name__, (cls,), {"__doc__": cls.__doc__, "__module__": __name__}))
    return register_method(cls.__name__.lower(), paper="none", complexity="O(N)", **more)(built)()


def test_a_good_method_passes() -> None:
    checks = contract.check_method(registered(Good))
    assert [c for c in checks if not c.ok] == []
    assert len(checks) == len(contract.ANY) + len(contract.CONNECTOR)


@pytest.mark.parametrize("cls", BROKEN)
def test_a_broken_promise_is_found_and_named(cls: type[Good]) -> None:
    checks = contract.check_method(registered(cls, query_aware=cls is Reads))
    assert BROKEN[cls] in [c.name for c in checks if not c.ok], checks
    assert all(c.detail for c in checks if not c.ok)


def test_a_method_that_is_not_described_is_found() -> None:
    @register_method("silent", paper="x")
    @dataclass(frozen=True)
    class Undescribed(ConnectorMethod):
        size: int = 3

    described = contract.check_method(Undescribed())[0]
    assert not described.ok
