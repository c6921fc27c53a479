"""`tokprune methods`: what there is, and what one of them does."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokprune.cli import options
from tokprune.cli.output import console_for, save_json
from tokprune.errors import OptionError
from tokprune.files import STDOUT
from tokprune.registry import STAGES, by_paper, list_methods, method_class
from tokprune.types import JsonObject


def facts(name: str) -> JsonObject:
    """Everything the registry knows of a method, as plain data."""
    cls = method_class(name)
    doc = inspect.getdoc(cls) or ""
    fields = [f for f in dataclasses.fields(cls) if f.init]
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    options = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields} | made
    required = any(f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING for f in fields)
    needs = () if required else getattr(cls(), "needs", ())
    return {
        **dataclasses.asdict(cls.info),
        "stage": cls.stage,
        "needs": list(needs),
        "options": {
            k: v if isinstance(v, int | float | str | bool | list | tuple | dict | type(None)) else str(v)
            for k, v in options.items()
        },
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "doc": doc,
    }


def families_of(needs: list[str]) -> str:
    """Signals with the blocks they are read at: "cls_attention at 0, 0.5"."""
    blocks: dict[str, list[str]] = {}
    for need in needs:
        name, _, block = need.partition(":")
        blocks.setdefault(name, []).append(block)
    parts = []
    for name, at in blocks.items():
        named = [b for b in at if b]
        where = f" at {len(named)} blocks" if len(named) > 3 else f" at {', '.join(named)}" if named else ""
        parts.append(name + (" and" + where if where and "" in at else where))
    return "; ".join(parts)


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only those of one stage.")] = None,
    query_aware: Annotated[
        bool | None, typer.Option("--query-aware/--query-agnostic", help="Only those that read the question, or not.")
    ] = None,
    merges: Annotated[
        bool | None, typer.Option("--merges/--selects", help="Only those that merge tokens, or not.")
    ] = None,
    json_file: options.Json = None,
) -> None:
    """List the methods, or explain one."""
    names = list_methods(stage, query_aware=query_aware, merges=merges) if name is None else named(name)
    rows, one = [facts(n) for n in names], name is not None and len(names) == 1
    if json_file is not None:
        data = rows[0] if one else [{k: v for k, v in r.items() if k != "doc"} for r in rows]
        save_json(console_for(json=json_file), json_file, data)
    if json_file == STDOUT:
        return
    if one:
        explain(rows[0])
        return
    console = Console()
    for at in STAGES:
        mine = [r for r in rows if r["stage"] == at]
        if mine:
            console.print(_table(at, mine))
    console.print("? reads the question, + merges tokens. tokprune methods NAME explains one.")


def named(name: str) -> list[str]:
    """The method of that name, or those of the paper of that name."""
    try:
        return [method_class(name).info.name]
    except OptionError:
        if papers := by_paper(name):
            return papers
        raise


def _table(stage: str, rows: list[JsonObject]) -> Table:
    """The methods of one stage: narrow enough for 80 columns, a first sentence each."""
    table = Table(title=stage, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=2)
    table.add_column()
    for r in rows:
        marks = ("?" if r["query_aware"] else " ") + ("+" if r["merges"] else "")
        table.add_row(r["name"], marks, escape(first_sentence(r["summary"])))
    return table


def first_sentence(text: str) -> str:
    """A summary up to its first full stop that ends a sentence."""
    return re.split(r"(?<=[a-z0-9)])\. ", text)[0].rstrip(".")


def explain(r: JsonObject) -> None:
    """Print one method's docstring, options and facts, of `facts`."""
    console = Console()
    year = f" ({r['year']})" if r["year"] else ""
    console.print(f"[bold]{r['name']}[/], stage {r['stage']}: {escape(r['paper'])}{year} {r['url']}\n")
    console.print(escape(r["doc"]) + "\n")
    if r["options"]:
        console.print("[bold]options[/]")
        for option, default in r["options"].items():
            console.print(f"  {option} = {default!r}")
    for preset, settings in r["presets"].items():
        values = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        console.print(f"  preset={preset!r}: {escape(values)}")
    flags = [
        ("reads the question", r["query_aware"]),
        ("merges tokens", r["merges"]),
        ("deterministic", r["deterministic"]),
    ]
    flags.append(("chooses its own count unless asked for one", r["adaptive"]))
    console.print(
        "[bold]facts[/] "
        + ", ".join(text for text, on in flags if on)
        + (f"; time {r['complexity']}" if r["complexity"] else "")
        + (f", memory {r['memory']}" if r["memory"] else "")
    )
    if r["needs"]:
        console.print("[bold]signals[/] " + escape(families_of(r["needs"])))
    if r["checked"]:
        c = r["checked"]
        console.print(f"[bold]checked against[/] {c['repository'] or 'no public code found'}")
        for label in ("agrees", "differs"):
            if c[label]:
                console.print(f"  {label}: {escape(c[label])}")
