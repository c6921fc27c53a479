"""What stands around the package: citation, changelog, templates and workflows say what is true of the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
GITHUB = sorted((ROOT / ".github").rglob("*.yml"))


def test_citation_and_changelog_have_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert citation["license"] == "Apache-2.0"
    assert f"({VERSION})" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8") or f"## {VERSION}" in (
        ROOT / "CHANGELOG.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", GITHUB, ids=lambda p: p.name)
def test_workflows_and_templates_parse_and_name_what_there_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    for module in re.findall(r"python -m (tools\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    if path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= set(data)
        assert all(field["attributes"]["label"] for field in data["body"])
    if path.parent.name == "workflows":
        assert data["permissions"] == {"contents": "read"}, "jobs get more only where they need it"
        assert all(job["runs-on"] and job["steps"] for job in data["jobs"].values())


def test_the_release_is_published_without_a_password() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
