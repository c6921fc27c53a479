"""One self-contained HTML page from tables and pictures: opens offline, sorts, reads well on a phone, asks the network
nothing.

Everything given is escaped. Pictures become data URIs; style and script stand in the page, and its content policy
allows only those two (by their hash) and data URIs, so a page cannot load or send anything. Needs jinja2 (the `plot`
extra).
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import ModuleType

from PIL import Image

from tokprune.errors import OptionError, missing_extra
from tokprune.files import write_text
from tokprune.types import Fields, JsonObject

_NUMBER = re.compile(r"^([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?:[%x×]|±\s*\S+)?$", re.IGNORECASE)
_MAGIC = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"<svg": "image/svg+xml",
    b"<?xml": "image/svg+xml",
}
PHOTO_BYTES = 400_000  # from this size on a picture without transparency is stored as JPEG where that is smaller


@dataclass(frozen=True)
class Value:
    """A table cell whose text is not its number: shown as `text`, sorted by `sort`, such as Value("1.2 GiB", 1.3e9)."""

    text: str
    sort: float


@dataclass(frozen=True)
class Table:
    """Rows under columns; a click on a column's head sorts. units: one per column ("" for none), printed in the head.

    A cell is a string, a number, a `Value` or None (an empty cell, sorted last). A column whose cells are all numbers,
    also written ones ("12.5 ± 0.3", "9 %", "1.4 x"), sorts as numbers, any other as text.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    units: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.units and len(self.units) != len(self.columns):
            raise OptionError(
                f"{len(self.units)} units for {len(self.columns)} columns; give one each, '' where there is none."
            )
        for row in self.rows:
            if len(row) != len(self.columns):
                raise OptionError(f"a row of {len(row)} cells under {len(self.columns)} columns: {list(row)!r}.")


@dataclass(frozen=True)
class PagePicture:
    """A PIL picture, or the bytes of a PNG, JPEG, GIF, WebP or SVG file. alt: what it shows, in words."""

    image: Image.Image | bytes
    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A heading with text (blank lines part paragraphs, "- " begins an item), tables and pictures."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[PagePicture] = ()


@dataclass(frozen=True)
class Page:
    """The whole report. command: what to type to make it again. environment: versions and machine, in order."""

    title: str
    command: str
    environment: Fields
    sections: Sequence[Section] = field(default=())


def require() -> ModuleType:
    """jinja2, or the error that says how to install it; commands ask before they measure for minutes."""
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "plot", "writing an HTML report") from error
    return jinja2


def render(page: Page) -> str:
    """The page as HTML text; equal pages give equal text."""
    jinja2 = require()
    from markupsafe import Markup

    folder = resources.files("tokprune.viz").joinpath("templates")
    source = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page.html": source["page.html"]}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        page=page,
        sections=[_section(section) for section in page.sections],
        style=Markup(source["page.css"]),
        script=Markup(source["page.js"]),
        style_hash=_hash(source["page.css"]),
        script_hash=_hash(source["page.js"]),
    )


def write(page: Page, path: str | Path) -> Path:
    """Render the page into a file, whose folder is made when missing. Raises OptionError when it cannot be written."""
    return write_text(path, render(page))


def _hash(text: str) -> str:
    """What a content policy names an inline block by; the template must put `text` between its tags unchanged."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _section(section: Section) -> JsonObject:
    return {
        "title": section.title,
        "blocks": blocks(section.text),
        "tables": [_table(table) for table in section.tables],
        "pictures": [
            {"uri": data_uri(p.image), "caption": p.caption, "alt": p.alt, "size": _size(p.image)}
            for p in section.pictures
        ],
    }


def blocks(text: str) -> list[tuple[str, list[str]]]:
    """Text as ("p", [paragraph]) and ("ul", items) in order."""
    out: list[tuple[str, list[str]]] = []
    for part in re.split(r"\n\s*\n", text.strip()):
        for line in filter(None, (raw.strip() for raw in part.split("\n"))):
            if line.startswith("- "):
                if not out or out[-1][0] != "ul":
                    out.append(("ul", []))
                out[-1][1].append(line[2:])
            elif out and out[-1][0] == "open":
                out[-1][1][0] += " " + line
            else:
                out.append(("open", [line]))
        out = [("p" if kind == "open" else kind, lines) for kind, lines in out]
    return out


def _table(table: Table) -> JsonObject:
    units = list(table.units) or [""] * len(table.columns)
    keys = [[_key(cell) for cell in row] for row in table.rows]
    numeric = []
    for i in range(len(table.columns)):
        column = [(row[i], key[i]) for row, key in zip(table.rows, keys, strict=True) if _shown(row[i])]
        numeric.append(bool(column) and all(key is not None for _, key in column))
    rows = [
        [
            {
                "text": _shown(cell),
                "sort": (None if key is None or math.isnan(key) else repr(key)) if numeric[i] else None,
            }
            for i, (cell, key) in enumerate(zip(row, key_row, strict=True))
        ]
        for row, key_row in zip(table.rows, keys, strict=True)
    ]
    columns = [{"name": n, "unit": u, "number": k} for n, u, k in zip(table.columns, units, numeric, strict=True)]
    return {"columns": columns, "rows": rows, "caption": table.caption}


def _key(cell: object) -> float | None:
    """The number that a cell sorts by, None when it has none."""
    if isinstance(cell, Value):
        return float(cell.sort)
    if isinstance(cell, int | float):
        return float(cell)
    match = _NUMBER.match(str(cell).strip()) if cell is not None else None
    return float(match.group(1)) if match else None


def _shown(cell: object) -> str:
    """The text of a cell: whole numbers as they are, others with four significant digits."""
    if cell is None:
        return ""
    if isinstance(cell, Value):
        return cell.text
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.0f}" if cell.is_integer() and abs(cell) < 1e15 else f"{cell:.4g}"
    return str(cell)


def data_uri(image: Image.Image | bytes) -> str:
    """A picture as a data URI: PNG, or JPEG where a large picture without transparency is smaller that way."""
    if isinstance(image, bytes):
        return _uri(image, _kind(image))
    picture = image if image.mode in ("RGB", "RGBA", "L", "P") else image.convert("RGB")
    png = _encoded(picture, "PNG")
    if len(png) > PHOTO_BYTES and picture.mode in ("RGB", "L"):
        jpeg = _encoded(picture, "JPEG", quality=92)
        if len(jpeg) < len(png) / 2:
            return _uri(jpeg, "image/jpeg")
    return _uri(png, "image/png")


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _kind(data: bytes) -> str:
    head = data.lstrip()[:16] if data[:1].isspace() else data[:16]
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    raise OptionError(
        f"these {len(data)} bytes are no PNG, JPEG, GIF, WebP or SVG file; give one of those or a PIL image."
    )


def _size(image: Image.Image | bytes) -> tuple[int, int] | None:
    """(width, height) for the page to leave room; None for vector graphics."""
    if isinstance(image, Image.Image):
        return image.size
    if _kind(image) == "image/svg+xml":
        return None
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.size
    except OSError as error:
        raise OptionError(f"a picture of the report cannot be read: {error}") from error
