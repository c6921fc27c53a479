"""What every connector method promises, tried on every one that is registered."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch

from tests.methods.streams import LAYOUTS, changed, stream
from tokprune.config import PruneConfig
from tokprune.errors import BudgetError, MissingQueryError, MissingSignalError, OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.registry import get_method, list_methods
from tokprune.tokens import Selection, VisualTokens

METHODS = list_methods("connector")
IGNORES_BUDGET = {"none"}  # documented: keeps all
every_method = pytest.mark.parametrize("name", METHODS)


@cache
def method(name: str) -> ConnectorMethod:
    built = get_method(name)
    assert isinstance(built, ConnectorMethod)
    return built


def keeps(n: int) -> list[int]:
    if n <= 7:
        return list(range(1, n + 1))
    if n > 100:
        return [1, 58, n - 1]
    return sorted({1, 2, 5, n // 3 | 1, n - 1, n})


def check(chosen: Selection, tokens: VisualTokens, keep: int, name: str) -> None:
    """Exactly `keep` unique ascending indices, and merge weights that fit them."""
    n = len(tokens)
    expected = n if name in IGNORES_BUDGET else keep
    indices = chosen.indices
    assert indices.shape == (expected,), f"{len(indices)} of {expected} tokens at N={n}"
    assert indices.dtype == torch.long
    assert not indices.requires_grad
    assert (indices[1:] > indices[:-1]).all(), "not unique and ascending"
    assert int(indices[0]) >= 0
    assert int(indices[-1]) < n
    if chosen.weights is not None:
        dense = chosen.weights.dense(expected, n).cpu()
        assert dense.shape == (expected, n)
        assert torch.isfinite(dense).all()
        assert (dense != 0).any(1).all(), "an output that nothing flows into"
    out = chosen.apply(tokens.features)
    assert out.shape == (expected, tokens.features.shape[1])
    assert out.dtype == tokens.features.dtype
    assert torch.isfinite(out).all()


def same(a: Selection, b: Selection, tokens: VisualTokens) -> None:
    assert torch.equal(a.indices, b.indices)
    torch.testing.assert_close(a.apply(tokens.features), b.apply(tokens.features), atol=1e-5, rtol=1e-5)


@every_method
@pytest.mark.parametrize("where", LAYOUTS)
def test_keeps_exactly_what_is_asked(name: str, where: str) -> None:
    tokens = stream(LAYOUTS[where], method(name).needs, seed=1)
    for keep in keeps(len(tokens)):
        check(method(name).select(tokens, keep), tokens, keep, name)


@every_method
def test_result_depends_on_no_neighbour_and_no_chance(name: str) -> None:
    needs = method(name).needs
    batch = [stream(LAYOUTS[w], needs, seed) for seed, w in enumerate(["image", "video", "image", "unpadded", "image"])]
    counts = [9, 13, 9, 21, 20]
    together = method(name).select_batch(batch, counts)
    backwards = method(name).select_batch(batch[::-1], counts[::-1])[::-1]
    torch.manual_seed(3)
    for tokens, keep, a, b in zip(batch, counts, together, backwards, strict=True):
        alone = method(name).select(tokens, keep)
        same(a, alone, tokens)
        same(b, alone, tokens)
        same(method(name).select(tokens, keep), alone, tokens)


def repeat_rows(x: torch.Tensor) -> torch.Tensor:
    """The first few rows over and over."""
    return x[torch.arange(len(x)) % min(5, len(x))]


DEGENERATE = {
    "duplicates": repeat_rows,
    "all equal": lambda x: x[:1].expand_as(x).clone(),
    "all ones": torch.ones_like,
    "some zero": lambda x: x * (torch.arange(len(x)) % 3 > 0).reshape(-1, *[1] * (x.dim() - 1)),
    "all zero": torch.zeros_like,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-6,
}


@every_method
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_inputs(name: str, kind: str) -> None:
    for where in ("image", "unpadded", "video"):
        tokens = changed(stream(LAYOUTS[where], method(name).needs, seed=2), DEGENERATE[kind])
        for keep in (1, 16, 33):
            check(method(name).select(tokens, keep), tokens, keep, name)


@every_method
def test_equal_attention(name: str) -> None:
    tokens = stream(LAYOUTS["tiles"], method(name).needs, seed=3)
    flat = {k: torch.full_like(v, 1 / 49) if v.dim() == 1 else v for k, v in tokens.signals.items()}
    tokens = dataclasses.replace(tokens, signals=flat)
    for keep in (1, 15, 47):
        check(method(name).select(tokens, keep), tokens, keep, name)


@every_method
def test_nan_is_refused_or_not_read(name: str) -> None:
    clean = stream(LAYOUTS["image"], method(name).needs, seed=4)
    expected = method(name).select(clean, 9).indices
    for broken in [None, *clean.signals]:
        source = clean.features if broken is None else clean.signals[broken]
        value = source.clone()
        value[min(5, len(value) - 1)] = torch.nan
        tokens = (
            dataclasses.replace(clean, features=value)
            if broken is None
            else dataclasses.replace(clean, signals={**clean.signals, broken: value})
        )
        try:
            chosen = method(name).select(tokens, 9)
        except OptionError as error:
            assert "NaN" in str(error)  # noqa: PT017 - either outcome is right, the message has to be too
        else:
            assert torch.equal(chosen.indices, expected), f"NaN in {broken or 'features'} changed the choice"


@every_method
def test_keeping_all_changes_nothing(name: str) -> None:
    for where in ("seven", "unpadded", "video"):
        tokens = stream(LAYOUTS[where], method(name).needs, seed=5)
        chosen = method(name).select(tokens, len(tokens))
        assert torch.equal(chosen.indices, torch.arange(len(tokens)))
        if not method(name).info.merges:
            assert torch.equal(chosen.apply(tokens.features), tokens.features)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    tokens = changed(stream(LAYOUTS["unpadded"], method(name).needs, seed=6), lambda x: x.to(dtype))
    for keep in (1, 17):
        check(method(name).select(tokens, keep), tokens, keep, name)


@every_method
def test_inputs_stay_as_they_are(name: str) -> None:
    for where in ("tiles", "video"):
        tokens = stream(LAYOUTS[where], method(name).needs, seed=7)
        before = [tokens.features.clone(), *(v.clone() for v in tokens.signals.values())]
        layout = [t.clone() for t in (tokens.layout.group, tokens.layout.row, tokens.layout.col)]
        method(name).select(tokens, 11)
        assert all(torch.equal(a, b) for a, b in zip(before, [tokens.features, *tokens.signals.values()], strict=True))
        now = (tokens.layout.group, tokens.layout.row, tokens.layout.col)
        assert all(torch.equal(a, b) for a, b in zip(layout, now, strict=True))


@every_method
def test_with_and_without_gradients(name: str) -> None:
    tokens = stream(LAYOUTS["unpadded"], method(name).needs, seed=8)
    with torch.no_grad():
        plain = method(name).select(tokens, 14)
    with torch.inference_mode():
        same(method(name).select(stream(LAYOUTS["unpadded"], method(name).needs, seed=8), 14), plain, tokens)
    tracked = changed(tokens, lambda x: x.clone().requires_grad_())
    chosen = method(name).select(tracked, 14)
    check(chosen, tracked, 14, name)
    same(chosen, plain, tokens)
    chosen.apply(tracked.features).sum().backward()
    grad = tracked.features.grad
    assert grad is not None
    assert torch.isfinite(grad).all()
    assert (grad[chosen.indices] != 0).any(1).all(), "a kept token gets no gradient"


@every_method
def test_question_is_asked_for_only_when_read(name: str) -> None:
    tokens = stream(LAYOUTS["image"], method(name).needs, seed=9, query=False)
    if method(name).query_aware:
        with pytest.raises(MissingQueryError):
            method(name).select(tokens, 9)
    else:
        check(method(name).select(tokens, 9), tokens, 9, name)


@every_method
def test_missing_signals_are_named(name: str) -> None:
    wanted = [need for need in method(name).needs if need != "clip_text"]
    for missing in wanted:
        tokens = stream(LAYOUTS["tiles"], method(name).needs, seed=10)
        signals = {k: v for k, v in tokens.signals.items() if k != missing}
        with pytest.raises(MissingSignalError, match=missing):
            method(name).select(dataclasses.replace(tokens, signals=signals), 9)


@every_method
@pytest.mark.parametrize("keep", [0, -1, 65])
def test_impossible_counts_are_refused(name: str, keep: int) -> None:
    if name in IGNORES_BUDGET:
        return
    tokens = stream(LAYOUTS["image"], method(name).needs, seed=11)
    with pytest.raises(BudgetError):
        method(name).select(tokens, keep)


@every_method
def test_config_round_trip(name: str) -> None:
    config = PruneConfig.build(name, ratio=0.1)
    again = PruneConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.methods[0] == method(name)
    assert hash(again.methods[0]) == hash(method(name))


@every_method
def test_is_a_described_frozen_dataclass(name: str) -> None:
    built = method(name)
    assert built.info.name == name
    assert built.info.paper
    assert built.info.complexity
    assert (type(built).__doc__ or "").strip()
    assert not (type(built).__doc__ or "").startswith(f"{type(built).__name__}("), "the docstring is the generated one"
    for field in dataclasses.fields(built):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(built, field.name, None)


@every_method
def test_shares_of_a_prompt_stay_exact(name: str) -> None:
    needs = method(name).needs
    batch = [stream(LAYOUTS[w], needs, seed) for seed, w in enumerate(["image", "image", "unpadded", "seven"])]
    given = [10, 10, 30, 1]
    shared = method(name).budgets(batch, given)
    assert sum(shared) == sum(given)
    assert all(1 <= k <= len(t) for k, t in zip(shared, batch, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_method
def test_on_a_gpu(name: str) -> None:
    for where in ("unpadded", "video"):
        here = stream(LAYOUTS[where], method(name).needs, seed=12)
        there = changed(here, lambda x: x.cuda())
        there = dataclasses.replace(there, layout=here.layout.to("cuda"))
        chosen = method(name).select(there, 17)
        assert chosen.indices.is_cuda
        check(chosen, there, 17, name)
