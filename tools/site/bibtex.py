"""BibTeX of the methods' papers: titles, years and links from the registry, authors from authors.json beside this."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from tokprune.types import JsonObject

ARXIV = re.compile(r"arxiv\.org/abs/(\d{4}\.\d{4,5}(?:v\d+)?)")


@cache
def authors() -> dict[str, list[str]]:
    """Authors by arXiv number, as the papers' own repositories or arXiv pages print them; not of every paper."""
    names: dict[str, list[str]] = json.loads((Path(__file__).parent / "authors.json").read_text(encoding="utf-8"))
    return names


def bibtex(facts: JsonObject) -> str:
    """The entry of one method's paper, or "" for baselines and parts of our own. facts: `cli.methods.facts`."""
    number = ARXIV.search(facts["url"] or "")
    if number is None:
        return ""
    eprint = number.group(1)
    fields = {"title": "{" + _escaped(facts["paper"]) + "}"}
    if eprint in authors():
        fields["author"] = " and ".join(authors()[eprint])
    fields |= {"year": str(facts["year"]), "eprint": eprint, "archivePrefix": "arXiv"}
    fields["url"] = f"https://arxiv.org/abs/{eprint}"
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{facts['name']},\n{lines}\n}}"


def _escaped(text: str) -> str:
    """What TeX reads as itself."""
    return re.sub(r"([&%#_])", r"\\\1", text).replace("“", "``").replace("”", "''")
