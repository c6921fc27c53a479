"""The site builds strictly, is whole, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import tokprune
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.slow
LOADED = {"script": "src", "img": "src", "link": "href"}
QUIET = {"canonical", "next", "prev", "edit"}  # <link> of these relations loads nothing


class Page(HTMLParser):
    """Addresses in a page. links: of <a>; loaded: what a browser fetches at once; ids: what a #fragment may name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and values.get("rel") not in QUIET and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
    folder: Path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "tools.site", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_and_pictures_lead_somewhere(pages: dict[Path, Page]) -> None:
    missing = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, fragment = unquote(link).partition("#")
            file = path if not target else (path.parent / target).resolve()
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (fragment and file in pages and fragment not in pages[file].ids | {"__codelineno"}):
                missing.append(f"{path.name}: {link}")
    assert missing == []


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    assert {link for page in pages.values() for link in page.loaded if re.match(r"(https?:)?//", link)} == set()


def test_every_method_has_a_page_with_what_it_should_say(site: Path) -> None:
    for name in tokprune.list_methods():
        text = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
        for title in ("Accuracy", "Cost", "How it works, options", "Beside the published code"):
            assert f'id="{re.sub("[^a-z]+", "-", title.lower())}"' in text, (name, title)
        assert (site / "methods" / "pictures" / f"{name}.webp").exists() or re.search("Not drawn|none to draw", text), (
            name
        )


def test_the_api_pages_show_signatures_and_docstrings(site: Path) -> None:
    text = (site / "api" / "tokprune.html").read_text(encoding="utf-8")
    assert 'id="tokprune.apply"' in text
    assert "fewer visual tokens, in place" in text
