"""`tokprune methods`: what there is, and what one of them does."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokprune.files import STDOUT, write_json
from tokprune.registry import list_methods, method_class
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
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the methods, or explain one."""
    if name is not None:
        explain(name, as_json)
        return
    rows = [facts(n) for n in list_methods(stage, query_aware=query_aware, merges=merges)]
    if as_json:
        write_json(STDOUT, [{k: v for k, v in r.items() if k != "doc"} for r in rows])
        return
    table = Table(title="methods", title_justify="left", header_style="bold")
    for column in ("name", "stage", "reads the question", "merges", "needs", "what it does"):
        table.add_column(column, no_wrap=column == "name")
    for r in rows:
        marks = ["yes" if r[flag] else "" for flag in ("query_aware", "merges")]
        table.add_row(r["name"], r["stage"], *marks, escape(families_of(r["needs"])), escape(r["summary"]))
    console = Console()
    console.print(table)
    console.print("tokprune methods NAME explains one.")


def explain(name: str, as_json: bool) -> None:
    """Print one method's docstring, options and facts."""
    r = facts(name)
    if as_json:
        write_json(STDOUT, r)
        return
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
        + (f"; {r['complexity']}" if r["complexity"] else "")
    )
    if r["needs"]:
        console.print("[bold]signals[/] " + ", ".join(r["needs"]))
    if r["checked"]:
        c = r["checked"]
        console.print(f"[bold]checked against[/] {c['repository'] or 'no public code found'}")
        for label in ("agrees", "differs"):
            if c[label]:
                console.print(f"  {label}: {escape(c[label])}")
