"""The tables of profiles and arithmetic: built once as plain tables, shown in the terminal and in the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def _times(cell: RunResult, *names: str) -> Value:
    value = sum(cell.times[n].median for n in names)
    spread = max(cell.times[n].spread for n in names)
    digits = 0 if value >= 100 else 1 if value >= 1 else 2
    return Value(f"{value:.{digits}f} ± {spread:.{digits}f}", value)


def _factor(value: float | None) -> Value | None:
    return None if value is None else Value(f"{value:.2f} x", value)


def _bytes(value: int | None) -> Value | None:
    return None if value is None else Value(readable(value), value)


def _flops(value: float) -> Value:
    return Value(flops_text(value).replace("FLOPs", "").strip() or "0", value)


def _share(cell: RunResult) -> Value:
    text = f"{cell.visual}" + (f" ({100 * cell.visual / cell.visual_full:.3g} %)" if cell.visual_full else "")
    return Value(text if cell.visual < cell.visual_full else f"{cell.visual}", cell.visual)


def _columns(
    columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[object]], caption: str, shown: Sequence[int]
) -> Table:
    """Some columns, each a head with its unit, of the rows."""
    heads, units = zip(*(columns[i] for i in shown), strict=True)
    return Table(heads, [[row[i] for i in shown] for row in rows], caption, units)


def time_table(report: ProfileReport, brief: bool = False) -> Table:
    """Where the time goes: a row per run, medians of the timed runs with half the interquartile range.

    brief: the columns that fit a terminal.
    """
    columns = [
        ("run", ""),
        ("visual tokens", ""),
        ("vision", "ms"),
        ("select", "ms"),
        ("prefill", "ms"),
        ("TTFT", "ms"),
        ("decode", "tokens/s"),
        ("other", "ms"),
        ("total", "ms"),
        ("TTFT", "faster"),
        ("total", "faster"),
        ("ideal", "faster"),
    ]
    rows: list[list[object]] = []
    for cell in report.cells:
        ideal = report.find("ideal", cell.ratio) if cell.kind == "pruned" else None
        decode = cell.times["decode_tokens_per_s"]
        plain = cell.kind == "plain"
        rows.append(
            [
                cell.name,
                _share(cell),
                _times(cell, "vision", "projector"),
                _times(cell, "select"),
                _times(cell, "prefill"),
                _times(cell, "ttft"),
                Value(f"{decode.median:.3g} ± {decode.spread:.2g}", decode.median),
                _times(cell, "other"),
                _times(cell, "total"),
                None if plain else _factor(report.speedup(cell, "ttft")),
                None if plain else _factor(report.speedup(cell)),
                None if ideal is None else _factor(report.speedup(ideal)),
            ]
        )
    lines = [
        f"Medians ± half the interquartile range of {report.environment.get('repeats', '?')} runs in changing order; "
        f"{report.explained}.",
        "select: from projector to LLM, scoring and pruning, and (pruned or not) embedding the text; other: "
        "bookkeeping.",
    ]
    lines += [f"{IDEAL}."] if any(c.kind == "ideal" for c in report.cells) else []
    lines += [f"{RESIZED}."] if any(c.kind == "resized" for c in report.cells) else []
    shown = [0, 1, 2, 3, 4, 5, 6, 8, 10] if brief else list(range(len(columns)))
    return _columns(columns, rows, "\n".join(lines), shown)


def cost_table(report: ProfileReport, brief: bool = False) -> Table:
    """What a run costs: tokens and FLOPs by stage, KV cache (measured and by arithmetic), peak memory."""
    columns = [
        ("run", ""),
        ("into projector", "tokens"),
        ("into LLM", "visual tokens"),
        ("prompt", "tokens"),
        ("cached per layer", "tokens"),
        ("vision", "FLOPs"),
        ("select", "FLOPs"),
        ("prefill", "FLOPs"),
        ("decode step", "FLOPs"),
        ("all", "FLOPs"),
        ("of plain", ""),
        ("KV cache", ""),
        ("by arithmetic", "KV cache"),
        ("peak memory", ""),
    ]
    plain = report.find("plain")
    whole = plain.flops_total(report.new_tokens) if plain else 0
    rows = []
    for cell in report.cells:
        f, t = cell.flops, cell.tokens
        total = cell.flops_total(report.new_tokens)
        cached = t.get("cached") or []
        mean = sum(cached) / len(cached) if cached else 0.0
        least_to_most = (
            f"{min(cached)} to {max(cached)}, mean {mean:.0f}" if cached and min(cached) < max(cached) else None
        )
        counted: list[object] = (
            [_flops(f["vision"] + f["projector"]), *(_flops(f[k]) for k in ("select", "prefill", "decode"))]
            if f
            else [None] * 4
        )
        rows.append(
            [
                cell.name,
                t.get("projector"),
                cell.visual,
                cell.prompt,
                Value(least_to_most or f"{mean:.0f}", mean) if cached else None,
                *counted,
                _flops(total) if f else None,
                Value(f"{100 * total / whole:.3g} %", total / whole) if f and whole else None,
                _bytes(cell.cache_bytes),
                _bytes(cell.cache_expected),
                _bytes(cell.peak_bytes),
            ]
        )
    caption = (
        f"FLOPs are counted by torch as they run, 2 per multiply-add; all: from pixels to {report.new_tokens} new "
        f"tokens. Peak memory, weights included: {report.environment.get('peak', 'of the device')}."
    )
    shown = [0, 3, 5, 6, 7, 8, 9, 10, 11, 13] if brief else list(range(len(columns)))
    shown = [i for i in shown if i == 0 or any(row[i] is not None for row in rows)]
    return _columns(columns, rows, caption, shown)


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
