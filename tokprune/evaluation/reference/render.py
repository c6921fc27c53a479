"""The published tables for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokprune.evaluation.export import Framed, pipe_table
from tokprune.evaluation.reference.tables import Entry, Model, PublishedTable


def value_text(value: float | None) -> str:
    """A number as published."""
    return "" if value is None else str(value)


def lines(table: PublishedTable) -> Iterator[list[str]]:
    """The rows as texts; a row's remark is numbered."""
    numbers = _remarks(table)
    for e in table.entries:
        mark = f" [{numbers[e.note]}]" if e.note else ""
        yield [e.label + mark, e.amount, *map(value_text, e.values)]


def _remarks(table: PublishedTable) -> dict[str, int]:
    return {note: i + 1 for i, note in enumerate(dict.fromkeys(e.note for e in table.entries if e.note))}


def remarks(table: PublishedTable) -> list[str]:
    """Everything to know of a table: its own note, then the rows' remarks by number."""
    return ([table.note] if table.note else []) + [f"[{i}] {note}" for note, i in _remarks(table).items()]


def terminal(model: Model, table: PublishedTable) -> Framed:
    """A published table for rich, its source above and its remarks below."""
    notes = "\n".join(part for part in [*remarks(table), table.url] if part)
    heads = ["method", "kept", *table.columns]
    return Framed(f"{model.title}: {table.source}", heads, list(lines(table)), ("method",), notes)


def markdown(table: PublishedTable) -> str:
    """A published table with its source above and remarks below."""
    source = f"[{table.source}]({table.url})" if table.url else table.source
    out = [f"### {source}", "", *pipe_table(["method", "kept", *table.columns], lines(table), ("method",))]
    return "\n".join([*out, "", *(f"{note}\n" for note in remarks(table))])


def to_text(models: Sequence[Model]) -> str:
    """Models as Markdown sections."""
    out = []
    for model in models:
        out += [f"## {model.title}", ""]
        facts = []
        if model.checkpoints:
            facts.append(f"`--model {model.name}`; checkpoints: {', '.join(f'`{c}`' for c in model.checkpoints)}.")
        if model.visual_tokens:
            facts.append(f"All tokens: {model.visual_tokens}.")
        if model.note:
            facts.append(model.note)
        out += [" ".join(facts), ""] if facts else []
        out += [markdown(table) for table in model.tables]
        if model.claims:
            out += ["### Other claims", "", *(f"- {claim}" for claim in model.claims), ""]
    return "\n".join(out)


def label(entry: Entry) -> str:
    """ "DivPrune, 64"."""
    return f"{entry.label}, {entry.amount}" if entry.amount else entry.label
