"""examples/tour.ipynb as a page: run while the site is built, so its outputs are never old and none are committed."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


@cache
def notebook_page() -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its pictures by name. Raises nbclient's error when a cell fails."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            lines += [cell.source, ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        printed = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
        shown = [o.data for o in cell.outputs if o.output_type != "stream"]
        printed += "".join(data["text/plain"] for data in shown if "image/png" not in data)
        if printed:
            lines += ["```text", printed.rstrip(), "```", ""]
        for data in (data for data in shown if "image/png" in data):
            name = f"tour_{len(pictures)}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            lines += [f"![output]({name})", ""]
    lines += ["[The notebook](../examples/tour.ipynb)", ""]
    return "\n".join(lines), pictures
