"""Imports point one way, and heavy packages are imported only where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.layers import (
    FILES,
    MAY_IMPORT,
    OPTIONAL,
    PUBLIC,
    ROOT,
    SUBCLASSED,
    TRANSFORMERS,
    UPPER,
    allowed,
    imports,
    layer,
    layers_table,
    module_of,
)


def test_every_layer_is_known() -> None:
    found = {layer(module_of(path)) for path in FILES} - {""}
    assert found <= {*MAY_IMPORT, *UPPER, "__main__"}, "give the new part of the package its place in this test"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    source = layer(module_of(path))
    if source == "__main__":
        return
    wrong = []
    for line, name in imports(path):
        if name.split(".")[0] != "tokprune":
            continue
        target = PUBLIC.get(layer(name), layer(name))
        if target and target != source and target not in allowed(source):
            wrong.append(f"line {line} imports {name}")
    assert not wrong, f"{source or 'tokprune/__init__.py'} may import {sorted(allowed(source))}: {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    source = layer(module_of(path))
    wrong = [line for line, name in imports(path) if name.split(".")[0] == "transformers"]
    assert source in TRANSFORMERS or not wrong, f"only {sorted(TRANSFORMERS)} may import transformers: lines {wrong}"
    own = {SUBCLASSED.get(path.relative_to(ROOT).as_posix())}
    eager = [(line, name) for line, name in imports(path, top_level=True) if name.split(".")[0] in OPTIONAL - own]
    assert not eager, f"optional packages are imported inside the functions that use them: {eager}"


def test_the_checker_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative imports, nested imports and TYPE_CHECKING blocks are read as Python does."""
    package = tmp_path / "tokprune" / "ops"
    package.mkdir(parents=True)
    source = package / "x.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "from tokprune import adapters\n"
        "from ..methods import base\n"
        "from . import similarity\n"
        "if TYPE_CHECKING:\n    import timm\nelse:\n    import av\n"
        "def f():\n    import transformers\n"
    )
    monkeypatch.setattr("tests.core.layers.ROOT", tmp_path / "tokprune")
    names = {name for _, name in imports(source)}
    expected = {"typing", "tokprune.adapters", "tokprune.methods", "tokprune.ops", "av", "transformers"}
    assert names == expected
    assert {name for _, name in imports(source, top_level=True)} == expected - {"transformers"}


def test_the_package_never_imports_the_workshop() -> None:
    """tools/, tests/ and benchmarks/ are not in the wheel."""
    wrong = [
        f"{path}:{line}"
        for path in FILES
        for line, name in imports(path)
        if name.split(".")[0] in ("tools", "tests", "benchmarks")
    ]
    assert not wrong


def test_contributing_says_who_imports_whom() -> None:
    """`python -m tools.pages` writes the table."""
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert layers_table() in page
