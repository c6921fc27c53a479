"""Names: look-up, options, lists, and third parties that join by an entry point."""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tokprune
from tokprune import registry
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.divprune import DivPrune
from tokprune.registry import STAGES, get_method, list_methods, method_class, register_method
from tokprune.tokens import Layout, Selection, VisualTokens


def test_names_lead_to_methods() -> None:
    assert get_method("divprune") == DivPrune()
    assert method_class("DivPrune") is DivPrune
    assert get_method("per-tile").info.name == "per_tile"
    assert tokprune.get_method is get_method


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"unknown method 'divprun'\. Did you mean 'divprune'\? Allowed: .*random"):
        get_method("divprun")
    with pytest.raises(OptionError, match="named by a string, not type"):
        get_method(DivPrune)  # type: ignore[arg-type]


def test_unknown_options_are_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"'random' has no option 'sed'\. Did you mean 'seed'\? Its options: seed"):
        get_method("random", sed=1)
    with pytest.raises(OptionError, match="Its options: none"):
        get_method("divprune", metric="l2")


def test_lists_are_sorted_and_filtered() -> None:
    names = list_methods()
    assert names == sorted(names)
    assert {"divprune", "random", "hired", "per_tile", "merge"} <= set(list_methods("connector"))
    assert set(names) == {name for stage in STAGES for name in list_methods(stage)}
    assert "relevance" in list_methods(query_aware=True)
    assert "divprune" in list_methods(query_aware=False)
    assert "pool" in list_methods("connector", merges=True)
    assert "divprune" not in list_methods(merges=True)
    with pytest.raises(OptionError, match="connector"):
        list_methods("conector")


def test_every_method_has_the_facts_that_tables_are_made_of() -> None:
    for name in list_methods():
        info = method_class(name).info
        assert info.name == name
        assert info.paper
        assert info.year is None or 1990 <= info.year <= 2100
        assert not info.url or info.url.startswith("https://")


def test_the_year_is_that_of_the_venue_in_the_docstring() -> None:
    for name in list_methods():
        cls = method_class(name)
        first = (cls.__doc__ or "").strip().splitlines()[0]
        venue = re.search(r"\([A-Z][\w ]+? (20\d\d)", first)
        if venue:
            assert cls.info.year == int(venue[1]), f"{name}: {first!r}, registered {cls.info.year}"


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test are forgotten after it."""
    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_loaded", list(registry._loaded))


@pytest.mark.usefixtures("own_names")
def test_a_user_can_register_a_method() -> None:
    @register_method("first_few", paper="a test", complexity="O(1)")
    @dataclass(frozen=True)
    class FirstFew(ConnectorMethod):
        """The first ones."""

        skip: int

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            """After the skipped ones."""
            return Selection(torch.arange(self.skip, self.skip + keep))

    with pytest.raises(OptionError, match="needs the option 'skip'"):
        get_method("first_few")
    method = get_method("first_few", skip=2)
    assert isinstance(method, FirstFew)
    assert method.select(VisualTokens(torch.zeros(9, 1), Layout.line(9)), 2).indices.tolist() == [2, 3]


@pytest.mark.usefixtures("own_names")
def test_registration_refuses_what_cannot_work() -> None:
    with pytest.raises(OptionError, match="must be a"):

        @register_method("plain", paper="a test")
        class Plain:
            stage = "connector"

    with pytest.raises(OptionError, match="unknown stage 'conector'"):

        @register_method("typo", paper="a test")
        @dataclass(frozen=True)
        class Typo(ConnectorMethod):
            stage = "conector"

    with pytest.raises(OptionError, match=r"the name 'divprune' is taken by tokprune\.methods"):

        @register_method("divprune", paper="a test")
        @dataclass(frozen=True)
        class Twice(ConnectorMethod):
            """Not the first of its name."""


def distribution(folder: Path, module: str, source: str) -> None:
    """A fake installed package with an entry point for methods."""
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    meta = folder / f"{module}-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{module} = {module}\n")


@pytest.mark.usefixtures("own_names")
def test_third_parties_join_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(
        tmp_path,
        "tokprune_guest",
        """
        from dataclasses import dataclass
        import torch
        from tokprune import Selection, register_method
        from tokprune.methods.base import ConnectorMethod

        @register_method("guest", paper="a test")
        @dataclass(frozen=True)
        class Guest(ConnectorMethod):
            def select(self, tokens, keep):
                return Selection(torch.arange(keep))
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tokprune_guest", raising=False)
    registry._loaded.clear()
    assert "guest" in list_methods("connector")
    chosen = get_method("guest").select(VisualTokens(torch.zeros(4, 1), Layout.line(4)), 2)  # type: ignore[attr-defined]
    assert chosen.indices.tolist() == [0, 1]


@pytest.mark.usefixtures("own_names")
def test_a_broken_guest_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "tokprune_broken_guest", "raise RuntimeError('needs a newer torch')")
    monkeypatch.syspath_prepend(tmp_path)
    registry._loaded.clear()
    with pytest.warns(UserWarning, match="tokprune_broken_guest.*needs a newer torch"):
        names = list_methods()
    assert "divprune" in names


@pytest.mark.usefixtures("own_names")
def test_a_module_of_ours_that_fails_keeps_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._loaded.clear()

    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(registry.importlib, "import_module", fail)
    for _ in range(2):
        with pytest.raises(ImportError):
            list_methods()


def test_presets_are_options_of_their_method() -> None:
    """Every preset of every method builds, differs from the defaults and yields to options given beside it."""
    found = [(name, preset) for name in list_methods() for preset in method_class(name).info.presets]
    assert ("mmtok", "qwen2_5_vl") in found
    for name, preset in found:
        settings = method_class(name).info.presets[preset]
        built = get_method(name, preset=preset)
        assert {k: getattr(built, k) for k in settings} == dict(settings)
        assert built == get_method(name, **settings) != get_method(name)
    assert get_method("mmtok", preset="qwen2_5_vl", stop_words=True).stop_words  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match="Did you mean 'qwen2_5_vl'"):
        get_method("mmtok", preset="qwen2_vl")
    with pytest.raises(OptionError, match="'random' has no presets"):
        get_method("random", preset="llava")


def test_a_published_method_says_what_it_was_checked_against() -> None:
    """A paper has a row: the official code and what agrees, or, where none was found, what the method follows
    instead."""
    classes = [method_class(name) for name in list_methods()]
    infos = [cls.info for cls in classes if cls.__module__.startswith("tokprune.")]  # not those of other tests
    papers = [info for info in infos if info.year is not None and not info.wrapper]
    assert len(papers) > 45
    others = [info.paper for info in infos if info not in papers]
    assert all(paper.startswith(("baseline: ", "wrapper")) for paper in others), others
    for info in papers:
        assert info.checked is not None, info.name
        assert info.checked.agrees or info.checked.differs, info.name
        assert info.checked.repository.count("/") == 1 or not (info.checked.repository or info.checked.agrees), (
            info.name
        )


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("FasterVLM", "fastervlm"),
        ("Zero-TPrune", "zerotprune"),
        ("PruMerge+", "prumerge_plus"),
        ("dart-llm", "dart_llm"),
    ],
)
def test_names_are_known_as_people_write_them(written: str, name: str) -> None:
    assert method_class(written).info.name == name


@pytest.mark.parametrize(
    ("paper", "names"),
    [
        ("llavolta", ["llavolta"]),
        ("adaptvision", ["adaptive_budget"]),
        ("VideoLLaMB", ["scenetilling"]),
        ("dtop", ["dtop"]),
        ("aurora", ["auroracap", "auroracap_frames"]),
    ],
)
def test_paper_names_lead_to_ours(paper: str, names: list[str]) -> None:
    from tokprune.cli.methods import named
    from tokprune.registry import by_paper

    assert named(paper) == names
    if paper != names[0]:
        with pytest.raises(OptionError, match=f"{paper}.*{'.*'.join(names)}"):
            method_class(paper)
    assert set(names) <= set(by_paper(paper)) | {paper}


def test_every_official_repository_leads_somewhere() -> None:
    """What people call a method is often the name of its repository."""
    from tokprune.registry import by_paper

    for name in list_methods():
        checked = method_class(name).info.checked
        if checked is not None and checked.repository:
            assert name in by_paper(checked.repository)
            assert name in by_paper(checked.repository.split("/")[1])


def test_two_names_never_read_alike() -> None:
    from tokprune.registry import _key

    assert len({_key(name) for name in list_methods()}) == len(list_methods())
