"""What errors tell a user to type is what that user can type."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tokprune.errors
from tokprune.errors import install_line, missing_extra

ROOT = Path(__file__).parent.parent.parent


def test_from_a_checkout_its_folder_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_line("eval") == "pip install -e '.[eval]'"
    monkeypatch.chdir(tmp_path)
    assert install_line("eval") == f"pip install -e '{ROOT}[eval]'"
    assert install_line("eval") in str(missing_extra("lmms-eval", "eval", "x"))


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"url": "file:///a b/tokprune", "dir_info": {}}, "pip install '/a b/tokprune[eval]'"),
        ({"url": "file:///x/t-1.whl", "archive_info": {}}, "pip install 'tokprune[eval] @ file:///x/t-1.whl'"),
        (
            {"url": "https://x/t.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'tokprune[eval] @ git+https://x/t.git@abc'",
        ),
        (None, "pip install 'tokprune[eval]'"),  # pip notes no URL for what an index brought
    ],
)
def test_from_elsewhere_the_same_source(told: object, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = None if told is None else json.dumps(told)
    monkeypatch.setattr(tokprune.errors, "__file__", "/nowhere/tokprune/errors.py")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda n: SimpleNamespace(read_text=lambda f: text))
    assert install_line("eval") == line


@pytest.mark.parametrize("package", ["timm", "open_clip", "torchvision", "matplotlib"])
def test_examples_name_the_line_for_what_they_need(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No example ends in a bare ModuleNotFoundError."""
    for example in sorted((ROOT / "examples").glob("*.py")):
        if re.search(rf"^\s*(import|from) {package}\b", example.read_text(encoding="utf-8"), re.MULTILINE):
            monkeypatch.setitem(sys.modules, package, None)
            monkeypatch.setattr(sys, "argv", [str(example)])  # some read options first
            with pytest.raises(SystemExit, match=re.escape(install_line("vision"))):
                runpy.run_path(str(example), run_name="__main__")


def test_no_page_and_no_message_installs_by_the_bare_name() -> None:
    """The package is on no index yet: `pip install tokprune` would install a stranger's."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if Path(name).name != Path(__file__).name and (ROOT / name).exists():
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not re.search(r"pip install (-U )?[\"']?tokprune(\[|\b(?! @))", text), name
