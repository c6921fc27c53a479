"""Tables for the terminal keep every number in one piece, however narrow it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tokprune.evaluation.export import Framed
from tokprune.evaluation.reference import models, terminal

HEADS = ("method", "kept", *(f"task {i}" for i in range(14)))
BODY = [[f"method {row}", str(64 * row), *(str(1506 + 17 * i + row) for i in range(14))] for row in range(1, 4)]


def printed(what: object, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(what)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 300])
def test_numbers_are_never_folded(width: int) -> None:
    lines = printed(Framed("a title", HEADS, BODY, ("method",), "a note"), width)
    assert all(len(line.rstrip()) <= width for line in lines)
    words = [word for line in lines for word in line.split()]
    for row in BODY:
        for number in row[1:]:
            assert number in words, f"{number} is not whole at {width} columns"
    assert "title" in words
    assert "note" in words


def test_every_published_number_is_whole_at_80_columns() -> None:
    for model in models().values():
        for table in model.tables:
            words = {word for line in printed(terminal(model, table), 80) for word in line.split()}
            numbers = {str(v) for entry in table.entries for v in entry.values if v is not None}
            assert numbers <= words, (model.name, table.source, sorted(numbers - words))
