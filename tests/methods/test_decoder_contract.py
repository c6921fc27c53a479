"""What every decoder method promises, tried on every one that is registered."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch

from tests.methods.decoder.layers import Dense, fresh, layer_tokens, steps
from tokprune.config import PruneConfig
from tokprune.errors import MissingSignalError, OptionError
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.registry import get_method, list_methods
from tokprune.schedule import Schedule
from tokprune.tokens import Selection

METHODS = list_methods("decoder")
every_method = pytest.mark.parametrize("name", METHODS)
FIXED = {"vtw"}  # documented: how much is left is not for a ratio to say
LITERAL = {"fastv", "dart_llm", "llavolta"}  # layer 2 whatever the depth
GRIDS = {
    "one token": [(1, 1)],
    "two": [(1, 2)],
    "square": [(8, 8)],
    "wide": [(3, 11)],
    "three pictures": [(4, 5), (3, 3), (6, 4)],
    "many small": [(1, 2), (1, 1), (2, 2), (1, 1)],
}


@cache
def method(name: str) -> DecoderMethod:
    built = get_method(name)
    assert isinstance(built, DecoderMethod)
    return built


def planned(name: str, depth: int, share: float) -> Schedule:
    """The method's plan for a share; its own where it refuses one."""
    if name not in FIXED:
        return method(name).plan(depth, share)
    with pytest.raises(OptionError, match="ratio"):
        method(name).plan(depth, share)
    return method(name).plan(depth, None)


def tokens_of(name: str, grids: str = "square", seed: int = 0, **more: int) -> LayerTokens:
    return layer_tokens(GRIDS[grids], method(name).needs, seed, **more)


def check(chosen: Selection, tokens: LayerTokens) -> None:
    """Unique ascending indices, and states that fit them."""
    v, k, indices = len(tokens.visual), len(chosen), chosen.indices
    assert indices.dtype == torch.long
    assert not indices.requires_grad
    assert (indices[1:] > indices[:-1]).all(), "not unique and ascending"
    assert ((indices >= 0) & (indices < v)).all()
    out = chosen.apply(tokens.hidden[tokens.visual])
    assert out.shape == (k, tokens.hidden.shape[1])
    assert out.dtype == tokens.hidden.dtype
    assert torch.isfinite(out).all()
    if chosen.weights is not None:
        assert (chosen.weights.dense(k, v) != 0).any(1).all(), "a slot that nothing flows into"


def same(a: Selection, b: Selection, tokens: LayerTokens) -> None:
    assert torch.equal(a.indices, b.indices)
    states = tokens.hidden[tokens.visual]
    torch.testing.assert_close(a.apply(states), b.apply(states), atol=1e-5, rtol=1e-5)


@every_method
@pytest.mark.parametrize("grids", GRIDS)
def test_the_last_step_leaves_exactly_what_is_asked(name: str, grids: str) -> None:
    n = sum(h * w for h, w in GRIDS[grids])
    for share in (0.0, 0.05, 0.3, 0.77, 1.0):
        counts = planned(name, 8, share).counts(n, None if name in FIXED else round(share * n))
        for text in (7, 1):
            shown = steps(method(name), tokens_of(name, grids, seed=1, text=text), counts)
            for (tokens, chosen), keep in zip(shown, counts, strict=False):
                check(chosen, tokens)
                assert len(chosen) == min(keep, len(tokens.visual)) or method(name).info.adaptive
            assert len(shown[-1][1]) == counts[-1]


@every_method
@pytest.mark.parametrize("depth", [2, 3, 4, 28, 32, 61])
def test_plans_fit_any_depth(name: str, depth: int) -> None:
    for share in (0.0, 0.1, 1.0):
        plan = planned(name, depth, share)
        assert plan.last == share or name in FIXED
        assert plan.layers[-1] < depth or name in LITERAL
    try:
        plan = method(name).plan(depth, None)
    except OptionError as error:
        assert "ratio" in str(error)  # noqa: PT017 - either outcome is right, the message has to be too
    else:
        assert plan.layers[-1] < depth or name in LITERAL


@every_method
def test_no_chance_and_no_trace(name: str) -> None:
    tokens = tokens_of(name, "three pictures", seed=2)
    before = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    before = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
    first = method(name).select(tokens, 17)
    torch.manual_seed(3)
    same(method(name).select(fresh(tokens), 17), first, tokens)
    assert all(torch.equal(getattr(tokens, k), v) for k, v in before.items())


@every_method
def test_keeping_all_changes_nothing(name: str) -> None:
    for grids in ("two", "square", "three pictures"):
        tokens = tokens_of(name, grids, seed=4)
        chosen = method(name).select(tokens, len(tokens.visual))
        assert torch.equal(chosen.indices, torch.arange(len(tokens.visual)))
        states = tokens.hidden[tokens.visual]
        assert torch.equal(chosen.apply(states), states)


def changed(tokens: LayerTokens, change) -> LayerTokens:  # type: ignore[no-untyped-def]
    """`change` applied to states, signals, queries, keys and values."""

    def attention(old: object) -> Dense:
        assert isinstance(old, Dense)
        return Dense(*(change(x) for x in (old.q, old.keys, old.values)))

    states = {k: change(getattr(tokens, k)) for k in ("hidden", "embeddings", "entering", "middle", "normed")}
    signals = {k: change(v) for k, v in tokens.signals.items()}
    return fresh(tokens, **states, signals=signals, below=attention(tokens.below), own=attention(tokens.own))


CHANGED = {
    "all equal": lambda x: x[..., :1, :].expand_as(x).clone() if x.dim() > 1 else torch.full_like(x, 0.1),
    "duplicates": lambda x: x[..., torch.arange(x.shape[-2]) % 5, :] if x.dim() > 1 else x[torch.arange(len(x)) % 5],
    "all zero": torch.zeros_like,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-6,
    "bfloat16": torch.Tensor.bfloat16,
    "float16": torch.Tensor.half,
    "float64": torch.Tensor.double,
}


@every_method
@pytest.mark.parametrize("kind", CHANGED)
def test_inputs_of_other_values_and_dtypes(name: str, kind: str) -> None:
    for grids in ("square", "three pictures"):
        tokens = changed(tokens_of(name, grids, seed=5), CHANGED[kind])
        for keep in (1, 16, 33):
            tokens.notes.clear()
            chosen = method(name).select(tokens, keep)
            check(chosen, tokens)
            assert len(chosen) == keep or method(name).info.adaptive


@every_method
def test_nan_is_refused_or_not_read(name: str) -> None:
    clean = tokens_of(name, seed=6)
    expected = method(name).select(clean, 9)
    for broken in ("hidden", "embeddings", "entering", "middle", "normed", "attention", *clean.signals):
        tokens = fresh(clean)
        if broken == "attention":
            bad = clean.below.keys.clone()
            bad[:, 20] = torch.nan
            tokens = fresh(
                clean, below=dataclasses.replace(clean.below, keys=bad), own=dataclasses.replace(clean.own, keys=bad)
            )  # type: ignore[type-var]
        else:
            source = clean.signals[broken] if broken in clean.signals else getattr(clean, broken)
            value = source.clone()
            value[20] = torch.nan
            change = {"signals": {**clean.signals, broken: value}} if broken in clean.signals else {broken: value}
            tokens = fresh(clean, **change)
        try:
            chosen = method(name).select(tokens, 9)
        except OptionError as error:
            assert "NaN" in str(error)  # noqa: PT017 - either outcome is right, the message has to be too
        else:
            assert torch.equal(chosen.indices, expected.indices), f"NaN in {broken} changed the choice"


@every_method
def test_gradients_reach_what_is_left(name: str) -> None:
    plain = tokens_of(name, seed=8)
    expected = method(name).select(plain, 14)
    tracked = changed(plain, lambda x: x.clone().requires_grad_())
    chosen = method(name).select(tracked, 14)
    check(chosen, tracked)
    same(chosen, expected, plain)
    chosen.apply(tracked.hidden[tracked.visual]).sum().backward()
    grad = tracked.hidden.grad
    assert grad is not None
    assert torch.isfinite(grad).all()
    if chosen.weights is None:
        assert (grad[tracked.visual[chosen.indices]] == 1).all()


@every_method
def test_what_is_missing_is_named(name: str) -> None:
    tokens = tokens_of(name, seed=9)
    for state in method(name).reads:
        with pytest.raises(OptionError, match=state):
            method(name).select(fresh(tokens, **{state: None}), 9)
    for signal in method(name).needs:
        signals = {k: v for k, v in tokens.signals.items() if k != signal}
        with pytest.raises(MissingSignalError, match=signal):
            method(name).select(fresh(tokens, signals=signals), 9)


@every_method
def test_config_round_trip(name: str) -> None:
    config = PruneConfig.build(method(name), ratio=0.1)
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
    assert not (type(built).__doc__ or "").startswith(f"{type(built).__name__}("), "the docstring is the generated one"
    for field in dataclasses.fields(built):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(built, field.name, None)
