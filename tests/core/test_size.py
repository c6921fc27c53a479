"""No file, function or signature of the package grows out of sight, and few values are typed `Any`."""

from __future__ import annotations

import ast
import io
import re
import tokenize

from tests.core.layers import FILES, ROOT

FILE_LINES, FUNCTION_LINES, PARAMETERS, ANY = 400, 60, 7, 488
DIRECTIVE = re.compile(r"#\s*(fmt|type|noqa|pragma|ruff)\b")  # for a tool, no reason


def reasons(text: str) -> set[int]:
    """Lines with a comment that is for readers."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string)}


def too_large(text: str) -> list[str]:
    """Functions of a source that are too long, or take too much, without a comment in the signature that says why."""
    out = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        parameters = len([name for name in names if name not in ("self", "cls")])
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines <= FUNCTION_LINES and parameters <= PARAMETERS:
            continue
        if reasons(text).isdisjoint(range(node.lineno, max(node.lineno + 1, node.body[0].lineno))):
            out.append(f"line {node.lineno}: {node.name} has {lines} lines and {parameters} parameters")
    return out


def test_files_and_functions_stay_small() -> None:
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in FILES}
    long = {str(path): count for path, text in texts.items() if (count := len(text.splitlines())) > FILE_LINES}
    assert not long, f"over {FILE_LINES} lines; cut it in two by what the parts are for: {long}"
    large = [f"{path} {which}" for path, text in texts.items() for which in too_large(text)]
    assert not large, (
        f"over {FUNCTION_LINES} lines or {PARAMETERS} parameters; cut it, or give the reason in a comment between "
        f"`def` and the body: {large}"
    )


def test_few_values_are_of_any_type() -> None:
    count = sum(len(re.findall(r"\bAny\b", path.read_text(encoding="utf-8"))) for path in FILES)
    assert count < ANY, f"{count} times Any; tokprune.types has names for what comes from other libraries"


def test_the_checker_sees_what_it_should() -> None:
    wide = ", ".join("abcdefgh")
    assert too_large(f"def f({wide}):\n    pass\n") == ["line 1: f has 2 lines and 8 parameters"]
    assert too_large(f"class A:\n    def f(self, a, *, {wide[3:]}):\n        pass\n") != []
    assert too_large("class A:\n    def f(self, a, b, c, d, e, f, g):\n        pass\n") == []
    assert too_large(f"def f({wide}):  # fmt: skip\n    pass  # why\n") != []
    assert too_large(f"def f(  # what the library passes\n    {wide},\n):\n    pass\n") == []
    body = "    x = 1\n" * 60
    assert too_large(f"def f():\n{body}") != []
    assert too_large(f"def f():\n{body[10:]}") == []
    assert (
        too_large(f"def f():\n    def g():\n    {body.replace(chr(10), chr(10) + '    ')}pass\n  # no reason\n") != []
    )
