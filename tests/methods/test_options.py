"""Options are declared once and checked in one place: every field of every method refuses every wrong kind of value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import pickle
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest

import tokprune
from tokprune.config import PruneConfig, method_from_dict, method_to_dict
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, Method
from tokprune.methods.frames_base import PerFrame
from tokprune.methods.options import Block, Compat, Limits, Seed, described, fitted, kinds, option
from tokprune.registry import get_method, list_methods, method_class

METHODS = list_methods()
OPTIONS = [(name, field) for name in METHODS for field in kinds(method_class(name))]
every_method = pytest.mark.parametrize("name", METHODS)
every_option = pytest.mark.parametrize(("name", "field"), OPTIONS, ids=[f"{n}-{f}" for n, f in OPTIONS])
NAN, INF = float("nan"), float("inf")


def flat(kind: Any) -> Iterator[Any]:
    """The plain types and Literals that an annotation allows, also inside tuples; a tuple itself as `tuple`."""
    args = get_args(kind)
    if get_origin(kind) is Literal or not args:
        yield kind
        return
    if get_origin(kind) is tuple:
        yield tuple
    for arg in args:
        if arg is not Ellipsis and not isinstance(arg, Limits):
            yield from flat(arg)


def wrong_values(kind: Any, limits: Limits) -> list[Any]:
    """Values that this annotation cannot mean, however it is read."""
    plain = set(flat(kind))
    literals = [k for k in plain if get_origin(k) is Literal]
    numbers = plain & {int, float}
    wrong: list[Any] = [object(), {"a": 1}, b"bytes", 1j, lambda: None]
    wrong += [] if type(None) in plain else [None]
    wrong += [] if bool in plain else [True, False, np.bool_(True)]
    wrong += [] if float in plain else [0.5, 4.0, np.float32(2.0), NAN]
    wrong += (
        [] if numbers else [3, -1, 10**30] if not any(type(c) is int for k in literals for c in get_args(k)) else [7]
    )
    wrong += [] if str in plain and not limits.choices else ["nonsense", "", "0.5x", "True"]
    wrong += [] if tuple in plain else [(), (1,), [1], ("a",)]
    if kind is str or get_origin(kind) is Literal:
        wrong += ["publshed", "Corrected", "nearest ", *([] if kind is str and not limits.choices else ["x"])]
        wrong = [w for w in wrong if not (kind is str and not limits.choices and isinstance(w, str))]
    if numbers:
        wrong += ["0.5", "8"] if kind != Block and Block not in get_args(kind) else []
        wrong += [NAN, INF, -INF, 10**400, -(10**400)]
        wrong += [limits.low - 1] if limits.low is not None else []
        wrong += [limits.high + 1] if limits.high is not None else []
        wrong += [limits.above] if limits.above is not None else []
        wrong += [limits.below] if limits.below is not None else []
    if tuple in plain:
        wrong += [(object(),), [None], ((1, 2),), "abc", {1, 2}]
        wrong += [(NAN,), (INF,), ("x",), (True,)] if numbers else [(3,), (0.5,), (True,)]
        wrong += [()] if limits.filled else []
    return wrong


@every_option
def test_every_wrong_kind_of_value_is_refused(name: str, field: str) -> None:
    cls = method_class(name)
    kind, limits = kinds(cls)[field]
    accepted = []
    for value in wrong_values(kind, limits):
        try:
            get_method(name, **{field: value})
        except OptionError as error:
            message = str(error)
            assert field in message or "unknown method" in message, f"{value!r}: {message} does not name the option"
        else:
            accepted.append(value)
    assert not accepted, f"{name}({field}=...) takes {accepted} for {described(kind, limits)}"


@every_option
def test_choices_are_all_taken_and_typos_are_answered(name: str, field: str) -> None:
    kind, limits = kinds(method_class(name))[field]
    choices = limits.choices or next((get_args(k) for k in flat(kind) if get_origin(k) is Literal), ())
    for choice in choices:
        assert getattr(_with(name, field, choice), field) == choice
    for choice in (c for c in choices if isinstance(c, str) and len(c) > 4):
        with pytest.raises(OptionError, match=f"Did you mean '{choice}'") as caught:
            get_method(name, **{field: choice[:2] + choice[3:]})
        assert all(str(c) in str(caught.value) for c in choices)


BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("fastvid", "longest"): {"stride": 1},
    ("protect", "border"): {"indices": (0,)},
}
"""What must be set with an option at its bound, by the checks that look at several options together."""


def _with(name: str, field: str, value: Any) -> Method:
    return get_method(name, **{**BESIDE.get((name, field), {}), field: value})


@every_option
def test_bounds_that_are_allowed_are_taken(name: str, field: str) -> None:
    kind, limits = kinds(method_class(name))[field]
    if get_origin(kind) is tuple or tuple in set(flat(kind)):
        return
    whole = float not in set(flat(kind))
    for bound in (limits.low, limits.high):
        if bound is not None:
            assert getattr(_with(name, field, int(bound) if whole else bound), field) == bound


@every_method
def test_defaults_pass_and_come_back_from_json(name: str) -> None:
    built = get_method(name)
    for f in dataclasses.fields(built):
        kind, limits = kinds(type(built))[f.name]
        value = getattr(built, f.name)
        assert fitted(kind, value, limits) == value
        if f.default is not dataclasses.MISSING:
            assert value == f.default
            assert type(value) is type(f.default)
    written = json.loads(json.dumps(method_to_dict(built)))
    assert method_from_dict(written) == built
    assert pickle.loads(pickle.dumps(built)) == built == deepcopy(built) == dataclasses.replace(built)
    again = PruneConfig.from_dict(json.loads(json.dumps(PruneConfig((built,), ratio=0.5).to_dict())))
    assert again.methods == (built,)


@every_method
def test_every_option_is_declared_and_described(name: str) -> None:
    for field, (kind, limits) in kinds(method_class(name)).items():
        text = described(kind, limits)
        assert text
        assert "typing" not in text
        assert "object at" not in text
        if field == "compat":
            assert kind == Compat


def test_a_message_says_what_was_given_what_is_allowed_and_what_to_type() -> None:
    said = {
        "evit: compat='publshed' is not one of corrected, published. Did you mean 'published'?": {"compat": "publshed"},
        "evit: keep=nan is not a number in (0, 1]. Write keep=0.7.": {"keep": NAN},
        "evit: fuse=1 is not True or False. Write fuse=True.": {"fuse": 1},
    }
    for message, options in said.items():
        with pytest.raises(OptionError) as caught:
            get_method("evit", **options)
        assert str(caught.value) == message


def test_values_are_stored_in_the_declared_type() -> None:
    assert type(get_method("tome", inflection=1).inflection) is float  # type: ignore[attr-defined]
    assert type(get_method("tome", k=np.int64(3)).k) is int  # type: ignore[attr-defined]
    assert type(get_method("gprune", threshold=np.float32(0.5)).threshold) is float  # type: ignore[attr-defined]
    assert get_method("tome", r=[8, 4]).r == (8, 4)  # type: ignore[attr-defined]
    assert get_method("evit", blocks=["3", "-2", "0.5", 0.25]).blocks == (3, -2, 0.5, 0.25)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Toy(ConnectorMethod):
    """A method of somebody else's, with every kind of option."""

    must: int = option(low=1)
    share: float = option(0.5, low=0, below=1, hint="It is a share.")
    pairs: tuple[tuple[int, float], ...] = ()
    where: Block | None = None
    seed: Seed = 0
    mode: Literal["a", "b", 3] | None = None
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    inner: ConnectorMethod | None = None
    anything: Any = None


def test_options_of_a_plug_in_are_checked_alike() -> None:
    toy = Toy(2, pairs=[[1, 2]], where="0.5", mode=3, inner=Toy(1), anything=object())  # type: ignore[arg-type]
    assert toy.pairs == ((1, 2.0),)
    assert toy.where == 0.5
    for wrong in (
        {"must": 0},
        {"must": 1, "share": 1},
        {"must": 1, "pairs": ((1, 2, 3),)},
        {"must": 1, "pairs": ((1.5, 2),)},
        {"must": 1, "where": 1.5},
        {"must": 1, "where": "middle"},
        {"must": 1, "where": "1.0"},
        {"must": 1, "seed": 2**64},
        {"must": 1, "mode": 3.0},
        {"must": 1, "mode": "c"},
        {"must": 1, "names": []},
        {"must": 1, "inner": "quota"},
    ):
        with pytest.raises(OptionError, match=r"^Toy: .* is not "):
            Toy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"share=1 is not a number in \[0, 1\)\. Write share=0\.5\. It is a share\."):
        Toy(1, share=1)
    with pytest.raises(OptionError, match="a method of the connector stage"):
        Toy(1, inner=PerFrame)  # type: ignore[arg-type]


def test_ranges_in_words() -> None:
    words = {
        "a number in [0, 1)": Limits(low=0, below=1),
        "a number in (0, 1]": Limits(above=0, high=1),
        "a number of at least 2": Limits(low=2),
        "a number above 0": Limits(above=0),
        "a number of at most 3": Limits(high=3),
        "a number below 3": Limits(below=3),
        "a number": Limits(),
    }
    for text, limits in words.items():
        assert described(float, limits) == text
        assert not limits.hold(math.nan)
        assert not limits.hold(math.inf)
    assert described(tuple[float, float] | None, Limits(low=0)) == "None or a tuple of 2 numbers of at least 0"  # type: ignore[arg-type]
    assert described(tuple[Block, ...], Limits(filled=True)).startswith(
        "a non-empty tuple of blocks of the vision tower"
    )  # type: ignore[arg-type]


def test_an_annotation_that_cannot_be_read_says_so() -> None:
    @dataclass(frozen=True)
    class Odd(ConnectorMethod):
        what: Missing = 0  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(OptionError, match="Odd: an annotation cannot be read"):
        Odd()


@cache
def read_in(path: str, of: str = "") -> frozenset[str]:
    """Attributes that a source reads, also by getattr; of: only those of what is called so."""
    found = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value).endswith(of):
            found.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            found.add(node.args[1].value)
    return frozenset(found)


@every_option
def test_an_option_is_read(name: str, field: str) -> None:
    """One that neither the method nor the runtime reads would be taken and do nothing."""
    lines = [cls for cls in method_class(name).__mro__ if cls.__module__.startswith("tokprune.")]
    runtime = map(str, Path(str(tokprune.__file__)).parent.joinpath("runtime").rglob("*.py"))
    reads = [read_in(inspect.getfile(cls)) for cls in lines] + [read_in(path, of="method") for path in runtime]
    assert any(field in names for names in reads), f"{name} has an option {field!r} that nothing reads"


PUBLISHED: dict[str, dict[str, Any]] = {
    "apt": {"thresholds": (5.5,)},
    "ats": {"first": 0.25},
    "auroracap": {"keep": 0.4},
    "dynamicvit": {"keep": 0.7, "blocks": (0.25, 0.5, 0.75)},
    "evit": {"keep": 0.7, "blocks": (0.25, 0.5, 0.75), "fuse": True},
    "ipcv": {"keep": 0.35, "first": 0.261, "steady": 3, "neighbours": 10},
    "mustdrop_merge": {"window": 3, "threshold": 0.8},
    "pitome": {"keep": 0.9125, "margin": 0.75, "alpha": 1.0, "variant": "auto", "proportional": False},
    "pixelprune": {"threshold": 0.0, "anchored": True},
    "rlt": {"threshold": 0.1},
    "toc3d": {"keep": 0.5, "first": 0.25},
    "tofu": {"switch": 0.5},
    "tome": {"inflection": 0.0, "proportional": True, "matching": "bipartite"},
    "zerotprune": {"similar": 0.3, "rounds": (30, 10, 1), "variance": (0.01, 0.7)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_those_that_the_docstring_gives_a_source_for(name: str) -> None:
    fields = {f.name: f.default for f in dataclasses.fields(method_class(name))}
    assert {key: fields[key] for key in PUBLISHED[name]} == PUBLISHED[name]
