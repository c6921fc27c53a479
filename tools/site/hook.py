"""MkDocs' hook: adds the pages that are made from the registry, the README, the command line and the API.

Links that leave docs/ on purpose (../benchmarks/results/x.json) work on a code host; here they lead to copies.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tokprune.registry import list_methods
from tools.site import pictures
from tools.site.method_pages import index_page, method_navigation, method_page
from tools.site.notebook import notebook_page
from tools.site.parts import api_pages, cli_page, limits_page, models_page

ROOT = Path(__file__).parents[2]
COPIES = "repository"  # where files outside docs/ come to lie in the site
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*|)(\))")
LIST = re.compile(r"^((?![-*`#|])\S.*)\n(?=- )", re.MULTILINE)  # right below a line: lists elsewhere
FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
SECTIONS = {
    "#models": "models.md",
    "#methods": "methods/index.md",
    "#when-it-does-not-help": "limits.md",
    "#not-there-yet": "limits.md",
}
"""Sections of the README that are pages here."""
WITH_PICTURES = os.environ.get("TOKPRUNE_SITE_PICTURES", "1") != "0"
_drawn: dict[str, bytes | str] = {}  # `mkdocs serve` builds many times in one process


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Sections that are made get their pages; what nobody has put into the navigation stands at its end."""
    made = {"methods/index.md": method_navigation(), "api/index.md": [p for p in api_pages() if p != "api/index.md"]}
    nav = _expanded(config.nav, made)
    known = set(_pages_of(nav))
    there = {p.relative_to(config.docs_dir).as_posix() for p in Path(config.docs_dir).rglob("*.md")}
    if rest := sorted(there - known):
        nav.append({"More": rest})
    config.nav = nav
    return config


def _expanded(nav: Any, made: dict[str, list[Any]]) -> Any:
    """`nav` with the made pages behind the index pages of their sections."""
    if isinstance(nav, list):
        return [_expanded(entry, made) for entry in nav]
    if isinstance(nav, dict):
        return {title: _expanded(entry, made) for title, entry in nav.items()}
    return [nav, *made[nav]] if nav in made else nav


def _pages_of(nav: Any) -> Iterator[str]:
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _pages_of(entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made."""
    made = {
        "methods/index.md": index_page(),
        "limits.md": limits_page(),
        "models.md": models_page(),
        "cli.md": cli_page(),
        **api_pages(),
    }
    made["tour.md"], shown = notebook_page()
    for name, picture in shown.items():
        files.append(File.generated(config, name, content=picture))
    made |= {name: (ROOT / name).read_text(encoding="utf-8") for name in FROM_ROOT}
    for name in list_methods():
        picture = _picture(name)
        if isinstance(picture, bytes):
            files.append(File.generated(config, f"methods/pictures/{name}.webp", content=picture))
            made[f"methods/{name}.md"] = method_page(name, f"pictures/{name}.webp")
        else:
            made[f"methods/{name}.md"] = method_page(name, None, picture)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for name in {name for file in files.documentation_pages() for name in _outside(file.src_uri, file.content_string)}:
        if name not in (*FROM_ROOT, "README.md"):
            files.append(File.generated(config, f"{COPIES}/{name}", abs_src_path=str(ROOT / name)))
    return files


def _picture(name: str) -> bytes | str:
    """WebP, or why there is none."""
    if not WITH_PICTURES:
        return "Built without pictures."
    if name not in _drawn:
        drawn = pictures.draw(name)
        if isinstance(drawn, str):
            _drawn[name] = drawn
        else:
            buffer = io.BytesIO()
            drawn.save(buffer, "webp", quality=88)
            _drawn[name] = buffer.getvalue()
    return _drawn[name]


def _target(page: str, link: str) -> str:
    """Path from the root of the repository that a link in a page leads to."""
    here = "" if page in FROM_ROOT else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(here, link))


def _outside(page: str, text: str) -> Iterator[str]:
    """Files of the repository outside docs/ that a page links to."""
    for _, link, _, _ in LINK.findall(text):
        target = _target(page, link)
        if not target.startswith(("docs/", "..")) and (ROOT / target).is_file():
            yield target


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ lead to the copies, and those of root pages into docs/."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        target = _target(here, link)
        if target == "README.md":
            place, anchor = SECTIONS.get(anchor, "index.md"), ""
        elif target in FROM_ROOT:
            place = target
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif files.get_file_from_path(f"{COPIES}/{target}"):
            place = f"{COPIES}/{target}"
        else:
            return match.group(0)
        relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{before}{relative}{anchor}{after}"

    return LIST.sub(r"\1\n\n", LINK.sub(moved, markdown))
