"""Configs: what they refuse, and that they come back from JSON as they went."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokprune import registry
from tokprune.config import TYPE, VERSION, PruneConfig, method_from_dict, method_to_dict
from tokprune.errors import BudgetError, OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.divprune import DivPrune
from tokprune.methods.connector.random import Random
from tokprune.methods.connector.wrappers import MergeDropped, PerTile
from tokprune.registry import list_methods, register_method


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig.build("divprune", ratio=0.1),
        PruneConfig.build("random", budget=64, seed=3),
        PruneConfig.build(PerTile(MergeDropped(Random(seed=7)), split="proportional"), ratio=1, positions="keep"),
        PruneConfig.build(["hired"], ratio=0.25, query="what is it?"),
        PruneConfig.build([DivPrune()], ratio=0.25, query=["what?", "where?"], positions="compact"),
    ],
    ids=lambda c: c.methods[0].info.name,
)
def test_round_trip(config: PruneConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "config.json")
    assert PruneConfig.load(tmp_path / "config.json") == config
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["type"], data["version"]) == (TYPE, VERSION)
    assert PruneConfig.from_dict(config.to_dict()) == config


def test_options_go_to_the_one_named_method() -> None:
    assert PruneConfig.build("random", ratio=0.5, seed=9).methods == (Random(seed=9),)
    with pytest.raises(OptionError, match=r"\['seed'\] need one method given by name"):
        PruneConfig.build(["random", "divprune"], ratio=0.5, seed=9)
    with pytest.raises(OptionError, match="need one method given by name"):
        PruneConfig.build(Random(), ratio=0.5, seed=9)


def test_methods_inside_sequences_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @register_method("several", paper="a test")
    @dataclass(frozen=True)
    class Several(ConnectorMethod):
        """Holds methods and nested numbers."""

        methods: tuple[ConnectorMethod, ...] = field(default_factory=tuple)
        steps: tuple[tuple[int, float], ...] = ()

    method = Several((Random(seed=1), PerTile(DivPrune())), ((2, 0.5), (8, 0.25)))
    assert method_from_dict(json.loads(json.dumps(method_to_dict(method)))) == method


def test_exactly_one_of_ratio_and_budget() -> None:
    with pytest.raises(BudgetError, match="neither ratio nor budget"):
        PruneConfig.build("divprune")
    with pytest.raises(BudgetError, match=r"both ratio=0\.1 and budget=64"):
        PruneConfig.build("divprune", ratio=0.1, budget=64)


@pytest.mark.parametrize("ratio", [0, 1.5, math.nan, "0.1", True])
def test_bad_ratios_are_refused(ratio: object) -> None:
    with pytest.raises(BudgetError, match="ratio"):
        PruneConfig.build("divprune", ratio=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, -3, 1.5, math.nan, "64", True])
def test_bad_budgets_are_refused(budget: object) -> None:
    with pytest.raises(BudgetError, match="budget"):
        PruneConfig.build("divprune", budget=budget)  # type: ignore[arg-type]


def test_bad_methods_are_refused() -> None:
    with pytest.raises(OptionError, match="no method given"):
        PruneConfig.build([], ratio=0.5)
    for wrong in (DivPrune, 3, None):
        with pytest.raises(OptionError, match="name or a method object, not"):
            PruneConfig.build(wrong, ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="two methods for the stage 'connector'"):
        PruneConfig.build(["divprune", "random"], ratio=0.5)
    with pytest.raises(OptionError, match="Did you mean 'keep'"):
        PruneConfig.build("divprune", ratio=0.5, positions="keeep")
    for query in (3, ["what?", 3]):
        with pytest.raises(OptionError, match="neither a question nor a list"):
            PruneConfig.build("divprune", ratio=0.5, query=query)  # type: ignore[arg-type]


def good() -> dict[str, object]:
    return PruneConfig.build("random", ratio=0.1).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "peft"}, "not a pruning config"),
        ({"version": VERSION + 1}, f"version {VERSION + 1} is not readable"),
        ({"version": None}, "version None is not readable"),
        ({"ratios": 0.1}, r"unknown config field 'ratios'\. Did you mean 'ratio'"),
        ({"ratio": "0.1"}, "ratio"),
        ({"budget": 64}, "both ratio"),
        ({"methods": []}, "no method given"),
        ({"methods": ["random"]}, "a method is written as"),
        ({"methods": [{"name": "random", "options": [1]}]}, "a method is written as"),
        ({"methods": [{"name": "random", "option": {"seed": 1}}]}, r"unknown field of a method 'option'"),
        ({"methods": [{"name": "randm"}]}, "Did you mean 'random'"),
        ({"methods": [{"name": "random", "options": {"sed": 1}}]}, "Did you mean 'seed'"),
    ],
)
def test_files_that_say_something_else_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneConfig.from_dict({**good(), **change})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe\x00bad", b"[1, 2]"):
        path.write_bytes(content)
        with pytest.raises(OptionError, match="pruning config"):
            PruneConfig.load(path)
    with pytest.raises(OptionError, match=r"missing\.json"):
        PruneConfig.load(tmp_path / "missing.json")


def test_one_place_turns_ratio_and_budget_into_a_count() -> None:
    assert [PruneConfig.build("divprune", ratio=0.1).count(n) for n in (0, 1, 5, 14, 15, 576)] == [0, 1, 1, 1, 2, 58]
    assert [PruneConfig.build("divprune", budget=64).count(n) for n in (0, 1, 63, 64, 576)] == [0, 1, 63, 64, 64]
    assert PruneConfig.build("tome", r=2).count(576) == 576
