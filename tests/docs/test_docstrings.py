"""Every public name says what it is for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import tokprune

OPTIONAL = {"lmms_eval", "matplotlib", "av", "decord", "torchcodec", "jinja2", "filelock", "pandas", "optuna", "vllm"}
ROOT = Path(tokprune.__file__).parent


def modules() -> Iterator[ModuleType]:
    """All modules of the package that this environment can import; those beside task files are scripts of lmms-eval."""
    for found in pkgutil.walk_packages([str(ROOT)], "tokprune."):
        if ".tasks." in found.name or found.name.endswith("__main__"):
            continue
        try:
            yield importlib.import_module(found.name)
        except ImportError as error:
            if (error.name or "").split(".")[0] not in OPTIONAL:
                raise


def undocumented(module: ModuleType) -> Iterator[str]:
    """Public names of a module without a docstring; a method that overrides a documented one has its docstring."""
    if not inspect.getdoc(module):
        yield module.__name__
    for name, value in vars(module).items():
        defined = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not defined or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__:  # of its own: a class would have that of its base
            yield f"{module.__name__}.{name}"
        members = vars(value) if inspect.isclass(value) else {}
        for member, thing in members.items():
            kinds = inspect.isfunction(thing) or isinstance(thing, property | classmethod | staticmethod)
            kinds = kinds and "<lambda>" not in repr(thing)  # a field's default
            if not member.startswith("_") and kinds and not inspect.getdoc(getattr(value, member)):
                yield f"{module.__name__}.{name}.{member}"


def test_every_public_name_has_a_docstring() -> None:
    found = list(modules())
    assert len(found) > 200
    assert [name for module in found for name in undocumented(module)] == []


def test_the_check_notices() -> None:
    module = ModuleType("own", "A module.")
    exec("def silent(): pass\nclass Loud:\n    'Says it.'\n    def quiet(self): pass\n", vars(module))
    for value in vars(module).values():
        if callable(value):
            value.__module__ = "own"
    assert list(undocumented(module)) == ["own.silent", "own.Loud.quiet"]
