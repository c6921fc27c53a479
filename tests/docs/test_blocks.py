"""Every code block of the README and of the how-tos does what the page says, followed from top to bottom."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tokprune
import tokprune.demo
from tests.docs.blocks import ROOT, SET_UP, Block, blocks, commands, on_cpu, prepare
from tokprune.adapters.prompting import build_inputs
from tokprune.cli.app import app

HOW_TOS = sorted(f"docs/howto/{p.name}" for p in (ROOT / "docs" / "howto").glob("*.md"))
PAGES = ["README.md", "docs/index.md", "docs/performance.md", *HOW_TOS]

FEWER = {"demo": ["--questions", "7"], "eval": ["--limit", "4"], "profile": ["--repeats", "1"]}
"""The last of a repeated option counts: the same commands on less."""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name, as the working directory."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(page: str) -> list[Block]:
    return [b for b in blocks(page) if b.kind == "python" and not b.why]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("page", [p for p in PAGES if python(p)])
def test_python_runs(page: str) -> None:
    """In one namespace per page; pages that begin with the reader's own model find the demo VLM under its name."""
    model, processor = tokprune.demo.load()
    example = tokprune.demo.held_out(1)[0]
    names = {
        "__name__": "page",
        "tokprune": tokprune,
        "model": model,
        "vlm": model,
        "vit": pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2)
        if page == "README.md"
        else None,
        "processor": processor,
        "inputs": build_inputs(model, processor, example.question, images=[example.image]),
    }
    for number, block in enumerate(python(page)):
        exec(compile(on_cpu(block.code), f"{page}, block {number}", "exec"), names)


def test_what_any_page_imports_is_there() -> None:
    """On all pages, those whose code is not run, too; by the source, since some modules import lmms-eval."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for module, names in re.findall(r"^from (tokprune[\w.]*) import (.+)", page.read_text("utf-8"), re.MULTILINE):
            found = find_spec(module)
            assert found is not None, f"{page.name}: there is no {module}"
            source = Path(str(found.origin)).read_text("utf-8")
            for name in re.findall(r"(\w+)(?: as \w+)?", names.partition("#")[0]):
                known = re.search(rf"\b{name}\b", source)
                assert known or find_spec(f"{module}.{name}"), f"{page.name}: there is no {module}.{name}"


def lines() -> list[object]:
    """(page, words) of every tokprune command, each once."""
    found = {
        " ".join(words[1:]): (page, words[1:])
        for page in PAGES
        for block in blocks(page)
        if block.kind in ("", "bash") and not block.why
        for words in commands(block)
        if words[0].rpartition("/")[2] == "tokprune"
    }
    return [pytest.param(page, words, id=line[:60]) for line, (page, words) in found.items()]


@pytest.mark.slow
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("page", "words"), lines())
def test_commands_run(page: str, words: list[str]) -> None:
    names: dict[str, object] = {}
    if page == "docs/howto/evaluate.md" and "mine" in words:  # the page writes the task's files before
        for block in python(page):
            exec(compile(block.code, page, "exec"), names)
    done = CliRunner().invoke(app, [on_cpu(w) for w in words] + FEWER.get(words[0], []))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page", PAGES)
def test_set_up_commands_name_what_there_is(page: str) -> None:
    """make's targets and pip's extras exist; nothing else stands in a shell block."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for block in blocks(page):
        if block.kind not in ("", "bash") or block.why:
            continue
        for words in commands(block):
            program = words[0].rpartition("/")[2]
            assert program in (*SET_UP, "tokprune", "python"), f"{page}: {words}; an output is a ```text block"
            if program == "make":
                assert words[1] in targets, words
            for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= set(extras), words


def test_blocks_that_are_not_run_are_few() -> None:
    """Each names its reason, and there are no more than these."""
    why = [b.why for page in PAGES for b in blocks(page) if b.why]
    assert sorted(why) == [
        "lmms-eval's tasks are loaded from the hub",
        *["needs several GPUs"] * 2,
        "tested in tests/evaluation, on pictures of its own",
        *["vLLM needs an environment of its own, make serve-test"] * 2,
    ]
