"""BibTeX of the methods' papers is well formed, and no author stands under a paper that no method has."""

from __future__ import annotations

import re

import pytest

import tokprune
from tokprune.cli.methods import facts
from tools.site.bibtex import ARXIV, authors, bibtex


@pytest.mark.parametrize("name", tokprune.list_methods())
def test_an_entry_has_what_a_citation_needs(name: str) -> None:
    r = facts(name)
    entry = bibtex(r)
    if not r["url"]:
        assert entry == ""
        return
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, re.MULTILINE))
    assert entry.startswith(f"@misc{{{name},\n")
    assert entry.endswith("\n}")
    assert entry.count("{") == entry.count("}")
    assert {"title", "year", "eprint", "url"} <= set(fields)
    assert fields["eprint"] in r["url"]
    for person in filter(None, fields.get("author", "").split(" and ")):
        assert re.fullmatch(r"others|[^,]+, [^,]+", person), person


def test_authors_are_of_papers_that_methods_have() -> None:
    papers = {m.group(1) for n in tokprune.list_methods() if (m := ARXIV.search(facts(n)["url"]))}
    assert set(authors()) <= papers
    assert len(papers - set(authors())) <= 0.3 * len(papers), sorted(papers - set(authors()))
