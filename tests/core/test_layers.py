"""Imports point one way, and heavy packages are imported only where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokprune

ROOT = Path(tokprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each layer of the package may import of the others, besides itself.
CORE = {"tokens", "budget", "errors", "files"}
MAY_IMPORT = {
    "errors": set[str](),
    "environment": set[str](),
    "files": {"errors"},
    "tokens": {"errors"},
    "budget": {"errors"},
    "ops": CORE,
    "registry": {"errors", "methods"},
    "config": {"budget", "errors", "methods", "registry"},
    "video": CORE | {"ops"},
    "methods": CORE | {"ops", "registry", "video"},
}
# The layers above; each may import those before it, and what stands in MAY_IMPORT.
UPPER = ("report", "adapters", "runtime", "api", "testing", "viz", "profiling", "demo", "loading", "evaluation", "cli")
TRANSFORMERS = {"adapters", "runtime", "testing", "demo", "loading", "profiling", "evaluation"}
# Classes of lmms-eval are subclassed here; lmms-eval imports the module by its entry point, and the sweep when it runs.
BORN_OF_LMMS_EVAL = {"evaluation/lmms_model.py"}
OPTIONAL = {"timm", "open_clip", "decord", "av", "matplotlib", "vllm", "lmms_eval", "torchvision", "triton", "peft"}


def layer(module: str) -> str:
    """`tokprune.ops.distance` -> `ops`; the package itself -> ``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING"


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported at run time. top_level: only what importing the module runs."""
    module, package = module_of(path), path.name == "__init__.py"
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from tokprune import ops` names a layer in its second half.
            yield from ((node.lineno, f"{name}.{a.name}" if name == "tokprune" else name) for a in node.names)
        elif type_checking(node):
            assert isinstance(node, ast.If)
            todo += node.orelse
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def allowed(source: str) -> set[str]:
    if source in MAY_IMPORT:
        return MAY_IMPORT[source]
    if source in UPPER:
        return {*MAY_IMPORT, *UPPER[: UPPER.index(source)]}
    return {*MAY_IMPORT, *UPPER} - {"cli"}


PUBLIC = {name: layer(module) for name, module in tokprune._PUBLIC.items()} | {"__version__": "errors"}


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
    own = {"lmms_eval"} if path.relative_to(ROOT).as_posix() in BORN_OF_LMMS_EVAL else set()
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
        "from . import distance\n"
        "if TYPE_CHECKING:\n    import timm\nelse:\n    import av\n"
        "def f():\n    import transformers\n"
    )
    monkeypatch.setattr("tests.core.test_layers.ROOT", tmp_path / "tokprune")
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
