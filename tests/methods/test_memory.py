"""Many tokens: the same choice without a matrix of all pairs, and memory that grows as the registry says."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.memory import PeakBytes
from tests.methods.streams import method_with_defaults, stream
from tokprune.ops import blocks
from tokprune.registry import list_methods
from tokprune.tokens import Layout, Selection, VisualTokens

every_method = pytest.mark.parametrize("name", list_methods("connector"))
LAYOUTS = {"image": Layout.grid(9, 11), "tiles": Layout.grid(7, 7, 3, "tiles", canvas=(1, 2), thumbnail=True)}


def streams(name: str) -> list[VisualTokens]:
    return [stream(layout, method_with_defaults(name).needs, seed=5) for layout in LAYOUTS.values()]


def choices(name: str) -> list[Selection]:
    return [method_with_defaults(name).select(tokens, 20) for tokens in streams(name)]


@every_method
def test_the_choice_is_the_same_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = choices(name)
    monkeypatch.setattr(blocks, "WHOLE", 6)
    monkeypatch.setattr(blocks, "ROWS", 5)
    for tokens, found, once in zip(streams(name), choices(name), expected, strict=True):
        assert torch.equal(found.indices, once.indices)
        torch.testing.assert_close(found.apply(tokens.features), once.apply(tokens.features))


def peak(name: str, columns: int) -> int:
    """Bytes that the choice among 24 * columns tokens of one picture, an eighth of which stay, holds at once."""
    method = method_with_defaults(name)
    tokens = stream(Layout.grid(24, columns), method.needs, seed=1)
    with torch.no_grad(), PeakBytes() as counted:
        method.select(tokens, 3 * columns)
    return counted.peak


@every_method
def test_memory_grows_as_declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `blocks.WHOLE`, here a hundredth of what it is. K grows with N, so that K N is quadratic."""
    monkeypatch.setattr(blocks, "WHOLE", 80)
    monkeypatch.setattr(blocks, "ROWS", 16)
    declared = method_with_defaults(name).info.memory
    quadratic = "N²" in declared or "KN" in declared
    exponent = math.log2(peak(name, 128) / peak(name, 64))
    assert exponent > 1.7 if quadratic else exponent < 1.3, (declared, exponent)


def test_bytes_are_counted_while_tensors_live() -> None:
    with PeakBytes() as counted:
        a = torch.zeros(1000)
        view = a[:500]
        b = a + 1
        del a, b
        c = view * 2
        c.add_(1)
    assert counted.peak == 8000
    assert counted.now == 4000 + 2000
