"""Whatever wraps a connector method hands every question on to it, or overrides it on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch

import tokprune.runtime.encoder.handoff  # noqa: F401  its wrapper is in no registry
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod, ScoreMethod, Wrapper
from tokprune.methods.connector.wrappers import MergeDropped, PerTile, Protect, Relevance
from tokprune.methods.connector.wrappers.adaptive_budget import AdaptiveBudget
from tokprune.methods.frames.uniform_frames import UniformFrames
from tokprune.methods.frames_base import PerFrame
from tokprune.methods.options import kinds
from tokprune.methods.prompt_rule import Shared
from tokprune.registry import MethodInfo, list_methods
from tokprune.runtime.encoder.handoff import SIGNAL, AmongSurvivors
from tokprune.tokens import Layout, Query, Selection, VisualTokens


@dataclass(frozen=True)
class Probe(ScoreMethod):
    """Answers every hook in a way of its own, and remembers which were asked."""

    asked: list[str] = field(default_factory=list)
    info = MethodInfo("probe", "a method that remembers")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("signal of the probe",)

    flag: bool = True

    @property
    def query_aware(self) -> bool:
        return self.flag

    @property
    def reads_examples(self) -> bool:
        return self.flag

    @property
    def exact(self) -> bool:
        return self.flag

    @property
    def drops_at_full_budget(self) -> bool:
        return self.flag

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        self.asked.append("budgets")
        return [keeps[0] + 1, keeps[1] - 1]

    def bounds(self, tokens: VisualTokens) -> tuple[int, int]:
        return 2, 7

    def scores(self, tokens: VisualTokens) -> torch.Tensor:
        self.asked.append("scores")
        return torch.arange(len(tokens), dtype=torch.float32)

    def select_batch(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        self.asked.append("select_batch")
        return [Selection(torch.arange(len(t))[-k:]) for t, k in zip(batch, keeps, strict=True)]

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        self.asked.append("select")
        return self.select_batch([tokens], [keep])[0]


BUILDERS: dict[type[Wrapper], Any] = {
    AdaptiveBudget: AdaptiveBudget,
    MergeDropped: MergeDropped,
    PerTile: PerTile,
    Protect: Protect,
    Relevance: Relevance,
    PerFrame: lambda method: PerFrame(UniformFrames(spread="tokens"), method),
    AmongSurvivors: AmongSurvivors,
    Shared: Shared,
}
OVERRIDDEN = {
    (AdaptiveBudget, "budgets"): "its rule is the point of it",
    (AmongSurvivors, "drops_at_full_budget"): "what did not survive goes, whatever the budget",
    (AmongSurvivors, "exact"): "fewer may have survived than the budget allows",
    (Shared, "budgets"): "the rule that it adds stands for the method's own",
    (Relevance, "query_aware"): "it reads the question itself",
    (Relevance, "select"): "it mixes into the scores and leaves `choose` to the method",
    (Relevance, "select_batch"): "as select",
}
FLAGS = {"query_aware", "reads_examples", "exact", "drops_at_full_budget"}
HOOKS = {name for name in vars(ConnectorMethod) if not name.startswith("_")} - {"stage", "narrows"} | {"needs", *FLAGS}


def wrappers(base: type = Wrapper) -> set[type]:
    found = {c for c in base.__subclasses__() if c.__module__.startswith("tokprune.")}
    return found.union(*(wrappers(c) for c in found))


def streams() -> list[VisualTokens]:
    """Two videos of two frames that have all signals."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(2):
        features = torch.randn(32, 8, generator=generator)
        signals = {SIGNAL: torch.ones(32), "cls_attention:0": torch.rand(32), "cls_logits:-1": torch.rand(32)}
        query = Query("what?", torch.randn(3, 8, generator=generator))
        out.append(VisualTokens(features, Layout.grid(4, 4, 2, "video"), signals, query))
    return out


def test_all_wrappers_are_under_test() -> None:
    list_methods()
    assert wrappers() == set(BUILDERS)


@pytest.mark.parametrize("name", list_methods("connector"))
def test_what_holds_a_method_is_a_wrapper(name: str) -> None:
    from tokprune.registry import method_class

    cls = method_class(name)
    members = [k for kind, _ in kinds(cls).values() for k in (kind, *get_args(kind))]
    holds = any(isinstance(k, type) and issubclass(k, ConnectorMethod) for k in members)
    assert holds == issubclass(cls, Wrapper) == cls.info.wrapper


@pytest.mark.parametrize("hook", sorted(HOOKS))
@pytest.mark.parametrize("cls", BUILDERS, ids=lambda c: c.__name__)
def test_every_hook_reaches_the_wrapped_method(cls: type[Wrapper], hook: str) -> None:
    probe = Probe()
    wrapper = BUILDERS[cls](probe)
    batch = streams()
    probe.asked.clear()
    if hook == "needs":
        reached = set(probe.needs) <= set(wrapper.needs)
    elif hook in FLAGS:
        reached = bool(getattr(wrapper, hook)) and not getattr(BUILDERS[cls](Probe(flag=False)), hook)
    elif hook == "budgets":
        shared = wrapper.budgets(batch, [10, 10])
        assert sum(shared) == 20
        reached = shared == [11, 9]
    elif hook == "bounds":
        reached = wrapper.bounds(batch[0]) == (2, 7)
    elif hook == "select":
        wrapper.select(batch[0], 20)
        reached = bool({"select", "select_batch"} & set(probe.asked))
    elif hook == "select_batch":
        assert len(wrapper.select_batch(batch, [20, 20])) == 2
        reached = bool({"select", "select_batch"} & set(probe.asked))
    else:
        pytest.fail(f"ConnectorMethod has a new hook {hook!r}: forward it in Wrapper, and say here how to ask for it.")
    assert reached == ((cls, hook) not in OVERRIDDEN), f"{cls.__name__}.{hook}"


def test_a_wrapper_of_somebody_else_needs_one_method() -> None:
    @dataclass(frozen=True)
    class Backwards(Wrapper):
        method: ConnectorMethod

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            return self.method.select(tokens, keep + 1)

    probe = Probe()
    assert [len(s) for s in Backwards(probe).select_batch(streams(), [3, 4])] == [4, 5]  # not past `select`
    assert Backwards("divprune").method.info.name == "divprune"  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a method of the connector stage"):
        Backwards(UniformFrames())  # type: ignore[arg-type]


def test_a_method_without_a_choice_says_so() -> None:
    @dataclass(frozen=True)
    class Empty(ConnectorMethod):
        pass

    with pytest.raises(OptionError, match="does not implement select"):
        Empty().select(streams()[0], 3)


def test_survivors_share_a_budget_by_the_rule_of_the_method_behind_them() -> None:
    plain, busy = streams()
    plain = dataclasses.replace(plain, features=plain.features[:1].expand(32, -1).clone())
    dead = torch.ones(32)
    dead[::2] = 0
    batch = [dataclasses.replace(t, signals={**t.signals, SIGNAL: dead}) for t in (plain, busy)]
    inner = AdaptiveBudget()
    alive = dead.nonzero()[:, 0]
    expected = inner.budgets([t.part(alive) for t in batch], [8, 8])
    assert AmongSurvivors(inner).budgets(batch, [8, 8]) == expected
    assert expected[0] < 8 < expected[1]
    assert sum(AmongSurvivors(inner).budgets(batch, [20, 20])) == 32  # no more than survived
