"""The published tables for the terminal and as Markdown; docs/reference.md is made of the latter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tokprune.evaluation.reference.tables import Benchmark, Entry, Model, Published

if TYPE_CHECKING:
    from rich.console import Group

HEAD = """\
# Published numbers

Made by `python -m tokprune.evaluation.reference --write docs/reference.md` from the files in tokprune/evaluation/reference;
do not edit. `tokprune eval --reference` prints them, `--model llava-1.5-7b`, `--methods`, `--tasks` choose; with a checkpoint
and tasks of these tables it runs and sets your numbers beside them.

None of these numbers was measured by us. They were read from papers, project pages, repositories and third parties' notes of
them, as each table says. **Compare within one table only**: sources differ in prompts, metrics and how they count tokens, and
one name may be several points apart between them (FastV on POPE with 192 tokens: 64.8, 79.2 and 75.8).
"""


def value_text(value: float | None) -> str:
    """A number as published."""
    return "" if value is None else str(value)


def heads(table: Published) -> list[str]:
    """Column heads."""
    return ["method", "kept", *table.columns]


def lines(table: Published) -> Iterator[list[str]]:
    """The rows as texts; a row's remark is numbered."""
    numbers = _remarks(table)
    for e in table.entries:
        mark = f" [{numbers[e.note]}]" if e.note else ""
        yield [e.label + mark, e.amount, *map(value_text, e.values)]


def _remarks(table: Published) -> dict[str, int]:
    return {note: i + 1 for i, note in enumerate(dict.fromkeys(e.note for e in table.entries if e.note))}


def remarks(table: Published) -> list[str]:
    """Everything to know of a table: its own note, then the rows' remarks by number."""
    return ([table.note] if table.note else []) + [f"[{i}] {note}" for note, i in _remarks(table).items()]


def terminal(model: Model, table: Published) -> Group:
    """A published table for rich, its source above and its remarks below."""
    from tokprune.evaluation.export import framed

    notes = "\n".join(part for part in [*remarks(table), table.url] if part)
    return framed(f"{model.title}: {table.source}", heads(table), list(lines(table)), ("method",), notes)


def markdown(table: Published) -> str:
    """A published table with its source above and remarks below."""
    source = f"[{table.source}]({table.url})" if table.url else table.source
    names = heads(table)
    out = [f"### {source}", "", "| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    out += ["| " + " | ".join(row) + " |" for row in lines(table)]
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


def page(models: Sequence[Model]) -> str:
    """docs/reference.md."""
    used = {b.name: b for m in models for t in m.tables for b in t.benchmarks if b.task}
    out = [HEAD, "## Benchmarks and tasks", "", "| column | lmms-eval task | metric | remark |", "|---|---|---|---|"]
    out += [_benchmark_line(b) for b in sorted(used.values(), key=lambda b: b.name.lower())]
    out += [
        "",
        "Other columns name their unit. `average%` is the mean share of the full model's score over the benchmarks of a paper.",
        "",
    ]
    return "\n".join(out) + "\n" + to_text(models).rstrip() + "\n"


def _benchmark_line(b: Benchmark) -> str:
    factor = "" if b.scale == 1 else f" × {b.scale:g}"
    return f"| {b.name} | `{b.task}` | {' + '.join(f'`{m}`' for m in b.metrics)}{factor} | {b.note} |"


def label(entry: Entry) -> str:
    """ "DivPrune, 64"."""
    return f"{entry.label}, {entry.amount}" if entry.amount else entry.label
