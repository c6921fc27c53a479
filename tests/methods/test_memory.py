"""Many tokens: the same choice without a matrix of all pairs, and memory that grows as declared, in every stage."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.memory import PeakBytes
from tests.methods.stages import STAGES
from tests.methods.streams import method_with_defaults, stream
from tokprune.ops import blocks
from tokprune.registry import list_methods, method_class
from tokprune.tokens import Layout, Selection, VisualTokens

every_method = pytest.mark.parametrize("name", list_methods("connector"))
LAYOUTS = {"image": Layout.grid(9, 11), "tiles": Layout.grid(7, 7, 3, "tiles", canvas=(1, 2), thumbnail=True)}


def declared_memory(name: str) -> str:
    return method_class(name).info.memory


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


OTHERS = [(stage, name) for stage in STAGES for name in list_methods(stage)]
WITHOUT_CLS = [("encoder", name) for name in ("ats", "evit", "toc3d")]
"""Methods that rank by the attention that patches receive where a tower has no [CLS]."""
every_other = pytest.mark.parametrize(
    ("stage", "name", "options"),
    [(*m, {}) for m in OTHERS] + [(*m, {"cls": False}) for m in WITHOUT_CLS],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)


@every_other
def test_other_stages_decide_the_same_in_blocks(
    stage: str, name: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = STAGES[stage](name, 12, **options)
    expected = decide()
    monkeypatch.setattr(blocks, "WHOLE", 6)
    monkeypatch.setattr(blocks, "ROWS", 5)
    for found, once in zip(decide(), expected, strict=True):
        torch.testing.assert_close(found, once, atol=1e-5, rtol=1e-4)


@every_other
def test_memory_of_other_stages_grows_as_declared(
    stage: str, name: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the input of one decision, from 576 tokens to 2,304."""
    monkeypatch.setattr(blocks, "WHOLE", 80)
    monkeypatch.setattr(blocks, "ROWS", 16)
    peaks = []
    for side in (24, 48):
        decide = STAGES[stage](name, side, **options)
        with torch.no_grad(), PeakBytes() as counted:
            made = decide()
        peaks.append(counted.peak)
        del made
    declared = declared_memory(name)
    if declared == "none":
        assert peaks == [0, 0]
        return
    exponent = math.log(peaks[1] / peaks[0]) / math.log(4)
    assert exponent > 1.7 if "N²" in declared else 0.8 < exponent < 1.3, (declared, exponent)


def test_every_method_declares_its_memory() -> None:
    assert [name for name in list_methods() if not declared_memory(name)] == []


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
