"""The pages on profiles and pictures: their commands parse, their links and pictures are there, their Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokprune.profiling.presets import list_presets

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = [DOCS / "profile.md", DOCS / "pictures.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_real_options(page: Path) -> None:
    from typer.main import get_command

    from tokprune.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^tokprune ([^#\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    for line in lines:
        name, *words = line.split()
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


def test_every_preset_is_named() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "fastvlm-0.5b" in b)
    assert set(block.split()) == set(list_presets())


def test_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGES[1].read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "docs", "exec")
