"""The tables of profiles and arithmetic: built once as plain tables, shown in the terminal and in the HTML report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokprune.profiling.memory import readable
from tokprune.profiling.published import KINDS
from tokprune.profiling.report import ProfileReport, RunResult, flops_text
from tokprune.types import Fields
from tokprune.viz.html import Table, Value

if TYPE_CHECKING:
    from rich.table import Table as RichTable

WIDE = 116  # columns of a terminal that holds medians with their spread
IDEAL = "ideal: the same LLM fed the reduced embeddings by hand, without the cost of selecting"
RESIZED = "resized: a smaller picture with about as many tokens, nothing pruned"


@dataclass(frozen=True)
class Column:
    """A column of a table: head, unit, and what a row of numbers shows in it. brief: it fits a terminal."""

    head: str
    unit: str
    shown: Callable[[Any], object]
    brief: bool = True


def table_of(columns: Sequence[Column], rows: Sequence[object], caption: str) -> Table:
    """The rows as these columns show them."""
    body = [[c.shown(row) for c in columns] for row in rows]
    return Table([c.head for c in columns], body, caption, [c.unit for c in columns])


def _times(*names: str) -> Callable[[RunResult], Value]:
    """Median and spread of the sum of some stages."""

    def shown(cell: RunResult) -> Value:
        value = sum(cell.times[n].median for n in names)
        spread = max(cell.times[n].spread for n in names)
        digits = 0 if value >= 100 else 1 if value >= 1 else 2
        return Value(f"{value:.{digits}f} ± {spread:.{digits}f}", value)

    return shown


def _decode(cell: RunResult) -> Value:
    rate = cell.times["decode_tokens_per_s"]
    return Value(f"{rate.median:.3g} ± {rate.spread:.2g}", rate.median)


def _share(cell: RunResult) -> Value:
    part = f" ({100 * cell.visual / cell.visual_full:.3g} %)" if cell.visual < cell.visual_full else ""
    return Value(f"{cell.visual}{part}", cell.visual)


def time_table(report: ProfileReport, brief: bool = False) -> Table:
    """Where the time goes: a row per run, medians of the timed runs with half the interquartile range.

    brief: the columns that fit a terminal.
    """

    def faster(cell: RunResult | None, what: str = "total") -> Value | None:
        gain = None if cell is None or cell.kind == "plain" else report.speedup(cell, what)
        return None if gain is None else Value(f"{gain:.2f} x", gain)

    def ideal(cell: RunResult) -> Value | None:
        return faster(report.find("ideal", cell.ratio)) if cell.kind == "pruned" else None

    columns = [
        Column("run", "", lambda c: c.name),
        Column("visual tokens", "", _share),
        Column("vision", "ms", _times("vision", "projector")),
        Column("select", "ms", _times("select")),
        Column("prefill", "ms", _times("prefill")),
        Column("TTFT", "ms", _times("ttft")),
        Column("decode", "tokens/s", _decode),
        Column("other", "ms", _times("other"), brief=False),
        Column("total", "ms", _times("total")),
        Column("TTFT", "faster", lambda c: faster(c, "ttft"), brief=False),
        Column("total", "faster", faster),
        Column("ideal", "faster", ideal, brief=False),
    ]
    lines = [
        f"Medians ± half the interquartile range of {report.environment.get('repeats', '?')} runs in changing order; "
        f"{report.explained}.",
        "select: from projector to LLM, scoring and pruning, and (pruned or not) embedding the text; other: "
        "bookkeeping.",
    ]
    lines += [f"{IDEAL}."] if any(c.kind == "ideal" for c in report.cells) else []
    lines += [f"{RESIZED}."] if any(c.kind == "resized" for c in report.cells) else []
    return table_of([c for c in columns if c.brief or not brief], report.cells, "\n".join(lines))


def _counted(*names: str) -> Callable[[RunResult], Value | None]:
    """FLOPs of some stages, where they were counted."""
    return lambda cell: flops_value(sum(cell.flops[n] for n in names)) if cell.flops else None


def flops_value(value: float) -> Value:
    """A number of FLOPs in a column that names the unit."""
    return Value(flops_text(value).replace("FLOPs", "").strip() or "0", value)


def bytes_value(value: int | None) -> Value | None:
    """A number of bytes, where it is known."""
    return None if value is None else Value(readable(value), value)


def _cached(cell: RunResult) -> Value | None:
    counts = cell.tokens.get("cached") or []
    if not counts:
        return None
    mean, low, high = sum(counts) / len(counts), min(counts), max(counts)
    return Value(f"{low} to {high}, mean {mean:.0f}" if low < high else f"{mean:.0f}", mean)


def cost_table(report: ProfileReport, brief: bool = False) -> Table:
    """What a run costs: tokens and FLOPs by stage, KV cache (measured and by arithmetic), peak memory."""
    plain = report.find("plain")
    whole = plain.flops_total(report.new_tokens) if plain else 0

    def total(cell: RunResult) -> Value | None:
        return flops_value(cell.flops_total(report.new_tokens)) if cell.flops else None

    def of_plain(cell: RunResult) -> Value | None:
        part = cell.flops_total(report.new_tokens) / whole if cell.flops and whole else None
        return None if part is None else Value(f"{100 * part:.3g} %", part)

    columns = [
        Column("into projector", "tokens", lambda c: c.tokens.get("projector"), brief=False),
        Column("into LLM", "visual tokens", lambda c: c.visual, brief=False),
        Column("prompt", "tokens", lambda c: c.prompt),
        Column("cached per layer", "tokens", _cached, brief=False),
        Column("vision", "FLOPs", _counted("vision", "projector")),
        Column("select", "FLOPs", _counted("select")),
        Column("prefill", "FLOPs", _counted("prefill")),
        Column("decode step", "FLOPs", _counted("decode")),
        Column("all", "FLOPs", total),
        Column("of plain", "", of_plain),
        Column("KV cache", "", lambda c: bytes_value(c.cache_bytes)),
        Column("by arithmetic", "KV cache", lambda c: bytes_value(c.cache_expected), brief=False),
        Column("peak memory", "", lambda c: bytes_value(c.peak_bytes)),
    ]
    caption = (
        f"FLOPs are counted by torch as they run, 2 per multiply-add; all: from pixels to {report.new_tokens} new "
        f"tokens. Peak memory, weights included: {report.environment.get('peak', 'of the device')}."
    )
    used = [c for c in columns if (c.brief or not brief) and any(c.shown(cell) is not None for cell in report.cells)]
    return table_of([Column("run", "", lambda c: c.name), *used], report.cells, caption)


def formula_table(report: ProfileReport) -> Table:
    """The papers' own numbers for each run: multiply-adds of the LLM's prefill by each formula."""
    names = list(report.cells[0].formulas) if report.cells else []
    rows = [[c.name, *(Value(f"{c.formulas[n] / 1e12:.4g}", c.formulas[n]) for n in names)] for c in report.cells]
    caption = "Papers count a multiply-add once and leave out tower and head; n counts all tokens of the prompt here."
    return Table(["run", *names], rows, caption, ["", *["T multiply-adds"] * len(names)])


def published_table(rows: Sequence[Fields]) -> Table:
    """What others report, with ours beside it; rows as `published.comparison` makes them."""
    made = [
        [
            r["method"],
            None if r["tokens"] is None else Value(r["kept"], r["tokens"]),
            KINDS[r["kind"]],
            r["change"],
            Value(f"{100 * r['share']:.3g} %", r["share"]),
            None if r["ours"] is None else Value(f"{100 * r['ours']:.3g} %", r["ours"]),
            r["ours_is"],
            r["setting"],
            r["source"],
        ]
        for r in rows
    ]
    heads = ["method", "tokens kept", "of what", "published", "left", "ours", "ours is", "setting", "source"]
    return Table(heads, made)


def to_rich(table: Table, title: str | None = None, narrow: bool = False) -> RichTable:
    """A table for the terminal; units stand under the heads. narrow: leave the spreads out."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    units = list(table.units) or [""] * len(table.columns)
    out = RichTable(
        title=escape(title) if title else None,
        caption=escape(table.caption) or None,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
    )
    for i, (name, unit) in enumerate(zip(table.columns, units, strict=True)):
        head = escape(name) + (f"\n[dim]{escape(unit)}[/]" if any(units) else "")
        out.add_column(head, justify="right" if i else "left", vertical="top")
    for row in table.rows:
        out.add_row(*(escape(_text(cell, narrow)) for cell in row))
    return out


def _text(cell: object, narrow: bool = False) -> str:
    text = "" if cell is None else cell.text if isinstance(cell, Value) else str(cell)
    return text.split(" ± ")[0] if narrow else text
