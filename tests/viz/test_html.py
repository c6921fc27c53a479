"""The report page without a browser: escaping, self-containment, cells and refusals. tests/browser opens it for
real."""

from __future__ import annotations

import base64
import builtins
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokprune.errors import MissingExtraError, OptionError, install_line
from tokprune.viz import html
from tokprune.viz.html import Page, PagePicture, Section, Table, Value

pytest.importorskip("jinja2")

EVIL = "<script>alert('x')</script> & \"quoted\""


def page() -> Page:
    picture = PagePicture(Image.new("RGB", (20, 10), (255, 0, 0)), EVIL, EVIL)
    table = Table([EVIL, "ms"], [[EVIL, 1.5], [None, float("nan")]], EVIL, ("", "ms"))
    return Page(EVIL, EVIL, {EVIL: EVIL, "none": None}, [Section(EVIL, EVIL, [table], [picture])])


class Tags(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_everything_given_is_escaped() -> None:
    text = html.render(page())
    tags = Tags(text).found
    assert sum(tag == "script" for tag, _ in tags) == 1  # the page's own
    assert EVIL not in text
    assert [a["alt"] for tag, a in tags if tag == "img"] == [EVIL]
    assert text.count("&lt;script&gt;alert(") >= 9


def test_nothing_is_loaded_from_anywhere() -> None:
    text = html.render(page())
    assert not re.search(r"https?://|url\(|@import", text)
    for _, attributes in Tags(text).found:
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
        assert not [name for name in attributes if name.startswith("on") or name == "style"]


def test_the_policy_names_exactly_the_page_s_own_style_and_script() -> None:
    text = html.render(page())
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside
        digest = base64.b64encode(hashlib.sha256(inside.group(1).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text


def test_cells_sort_by_their_number() -> None:
    rows: list[list[Any]] = [
        ["a", 3, "12.5 ± 0.3", Value("1 GiB", 2.0**30), "9 %", "1", "x"],
        ["b", 0.25, "7", Value("900 B", 900), None, "1.5 x", 2],
    ]
    made = html._table(Table(list("abcdefg"), rows))
    assert [c["number"] for c in made["columns"]] == [False, True, True, True, True, True, False]
    assert [[c["sort"] for c in row] for row in made["rows"]] == [
        [None, "3.0", "12.5", "1073741824.0", "9.0", "1.0", None],
        [None, "0.25", "7.0", "900.0", None, "1.5", None],
    ]
    assert [c["text"] for c in made["rows"][1]] == ["b", "0.25", "7", "900 B", "", "1.5 x", "2"]
    assert html._shown(float("nan")) == ""
    assert (html._shown(1234567.0), html._shown(0.123456)) == ("1234567", "0.1235")


def test_text_becomes_paragraphs_and_lists() -> None:
    assert html.blocks("one\nline\n\ntwo\n- a\n- b\n\nthree") == [
        ("p", ["one line"]),
        ("p", ["two"]),
        ("ul", ["a", "b"]),
        ("p", ["three"]),
    ]
    assert html.blocks("  ") == []


def test_pictures_of_every_kind() -> None:
    red = Image.new("RGB", (8, 6), (255, 0, 0))
    for kind, mime in (("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp")):
        buffer = io.BytesIO()
        red.save(buffer, kind)
        assert html.data_uri(buffer.getvalue()).startswith(f"data:image/{mime};base64,")
        assert html._size(buffer.getvalue()) == (8, 6)
    assert html.data_uri(b"<?xml version='1.0'?><svg/>").startswith("data:image/svg+xml")
    assert html._size(b"<svg/>") is None
    back = Image.open(io.BytesIO(base64.b64decode(html.data_uri(red).split(",")[1])))
    assert back.getpixel((3, 3)) == (255, 0, 0)
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    assert html.data_uri(Image.fromarray(noise)).startswith("data:image/jpeg")
    assert html.data_uri(Image.fromarray(noise).convert("RGBA")).startswith("data:image/png")
    with pytest.raises(OptionError, match="9 bytes are no PNG"):
        html.data_uri(b"something")


def test_equal_pages_give_equal_files(tmp_path: Path) -> None:
    first = html.write(page(), tmp_path / "new" / "a.html")
    assert first.read_text(encoding="utf-8") == html.render(page())
    with pytest.raises(OptionError, match="cannot write"):
        html.write(page(), first / "b.html")


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="a row of 1 cells under 2 columns"):
        Table(["a", "b"], [["1"]])
    with pytest.raises(OptionError, match="1 units for 2 columns"):
        Table(["a", "b"], [], units=["ms"])


def test_without_jinja_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("jinja2"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=re.escape(install_line("plot"))):
        html.render(page())
