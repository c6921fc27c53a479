"""`tokprune new-method` and `tokprune check-method`: what is written works at once, and what is broken is named."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokprune import registry
from tokprune.cli.app import app
from tokprune.errors import OptionError

run = CliRunner().invoke


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A freshly written plug-in; what it registers is forgotten."""
    registry.list_methods()
    before = dict(registry._methods)
    folder = tmp_path / "mine"
    result = run(app, ["new-method", "my_longest", "-o", str(folder)])
    assert result.exit_code == 0, result.exception
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    registry._methods.clear()
    registry._methods.update(before)
    sys.modules.pop("tokprune_my_longest", None)


def test_what_is_written_passes_its_own_tests(package: Path) -> None:
    tests = runpy.run_path(str(package / "tests" / "test_my_longest.py"))
    assert len(tests["GOLDEN"]) >= 2
    for case in tests["GOLDEN"]:
        tests["test_golden"](case)
    tests["test_contract"]()
    project = tomllib.loads((package / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["tokprune.methods"] == {"my_longest": "tokprune_my_longest"}
    for path in filter(Path.is_file, package.rglob("*")):
        if path.suffix != ".pyc":
            assert not re.search("@[A-Z]+@", path.read_text()), path  # a mark of the template


@pytest.mark.slow
def test_its_pytest_passes_as_a_user_runs_it(package: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", *words], cwd=package, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_checking_it(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    words = ["check-method", "my_longest", "--file", str(package / "tokprune_my_longest.py"), "--option", "mix=0.3"]
    result = run(app, [*words, "--families", "llava", "--json", str(out)])
    assert result.exit_code == 0, result.output
    checks = json.loads(out.read_text())["checks"]
    assert set(checks) == {"contract", "llava"}
    assert all(c["ok"] for part in checks.values() for c in part)
    assert len(checks["llava"]) == 7


def test_a_broken_method_is_named_with_the_reason_in_contract_and_model(package: Path) -> None:
    file = package / "tokprune_my_longest.py"
    text = file.read_text()
    broken = text.replace("return (1 - mix)", "return torch.rand(len(features)) + 0 * (1 - mix)")
    file.write_text(broken.replace("from torch import Tensor", "import torch\nfrom torch import Tensor"))
    result = run(app, ["check-method", "my_longest", "--file", str(file), "--families", "llava"])
    assert result.exit_code == 1
    assert "failed depends on no neighbour and no chance: " in result.output
    assert "needs a seed field" in result.output
    assert "failed with a cache = without" in result.output


def test_methods_that_cannot_be_tested_in_a_model_say_so() -> None:
    result = run(app, ["check-method", "tome", "--families", "llava"])
    assert result.exit_code == 0
    assert "not tested models: the matrix is for the connector stage" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new-method", "divprune"], "is taken"),
        (["new-method", "My-Method"], "my_method"),
        (["new-method", "class"], "no name of a method"),
        (["check-method", "divprun"], "divprune"),
        (["check-method", "divprune", "--families", "lava"], "lava"),
        (["check-method", "divprune", "--file", "no.py"], "no.py"),
    ],
)
def test_wrong_names(words: list[str], said: str) -> None:
    error = run(app, words).exception
    assert isinstance(error, OptionError)
    assert said in str(error)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    error = run(app, ["new-method", "mine", "-o", str(tmp_path)]).exception
    assert isinstance(error, OptionError)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
