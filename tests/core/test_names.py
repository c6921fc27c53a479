"""One name stands for one thing: no two classes of the package share one."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.core.layers import FILES, ROOT


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
