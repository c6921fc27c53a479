"""docs/architecture.md names stations that exist, and few enough to follow."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "architecture.md"
AT_MOST = {"From `ratio` to a method": 8, "From the encoder to the LLM": 9}


def stations(title: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


def find(name: str) -> object:
    """What `runtime.prefill.Prefill._plan` names: the longest module, then attributes."""
    parts = ["tokprune", *name.split(".")]
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("title", AT_MOST)
def test_stations_exist_and_are_few(title: str) -> None:
    names = stations(title)
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    assert len(names) == len(re.findall(r"^\d+\.", section, re.MULTILINE)), "every station begins with its name"
    assert 1 < len(names) <= AT_MOST[title]
    for name in names:
        assert callable(find(name)), name


def test_other_names_exist() -> None:
    """What the text mentions besides, as `module.Name`."""
    for name in re.findall(r"`((?:runtime|adapters|methods|schedule)\.[\w.]+)`", PAGE.read_text(encoding="utf-8")):
        find(name)
