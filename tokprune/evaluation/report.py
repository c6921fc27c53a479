"""Plots and the one-file HTML report of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.environment import command_line
from tokprune.evaluation.cells import BASELINE
from tokprune.evaluation.export import ResultColumn, caption, details, used_columns
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import Row, scale
from tokprune.viz.plots import Point, accuracy_over_ratio, pareto, png, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokprune.viz.html import Page

#: Prices that a score is set against: the field of a row, the axis, and what turns the number into the axis' unit.
PRICES = {
    "tokens": ("kept", "visual tokens per question", 1.0),
    "flops": ("flops", "GFLOPs per answer", 1e-9),
    "ttft": ("ttft_ms", "time to first token (ms)", 1.0),
}


@dataclass(frozen=True)
class Plot:
    """A figure of one task: its file name without ending, the figure, and a sentence about it."""

    name: str
    task: str
    figure: Figure
    text: str


def figures(rows: Sequence[Row]) -> list[Plot]:
    """Score over keep ratio, and against tokens, FLOPs and time to first token, for each task with pruned cells."""
    out = []
    rows = [row for row in rows if math.isfinite(row.score)]  # a metric may have failed
    for task in dict.fromkeys(r.task for r in rows):
        mine = [r for r in rows if r.task == task]
        pruned = [r for r in mine if r.method != BASELINE]
        if not pruned:
            continue
        base = next((r for r in mine if r.method == BASELINE), None)
        label = f"{mine[0].metric}{' (%)' if mine[0].percent else ''}"
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", task)
        figure = accuracy_over_ratio(
            [_point(r) for r in pruned], None if base is None else base.score, title=task, score=label
        )
        text = (
            "Score over the share of visual tokens kept; bars are the 95 % interval of the paired difference to "
            "all tokens."
        )
        out.append(Plot(f"{name}_ratio", task, figure, text))
        for price, (field, axis, by) in PRICES.items():
            points = [_point(r, field, by) for r in pruned]
            if any(p.cost is not None for p in points):
                full = None if base is None else _point(base, field, by)
                figure = pareto(points, full, cost=axis, title=task, score=label)
                out.append(Plot(f"{name}_{price}", task, figure, f"Score against {axis}; the line joins the best."))
    return out


def _point(row: Row, price: str | None = None, by: float = 1.0) -> Point:
    low = high = None
    if row.paired is not None and row.percent:
        base = row.score - scale(row) * row.paired.difference
        low, high = base + scale(row) * row.paired.low, base + scale(row) * row.paired.high
    cost = None if price is None or getattr(row, price) is None else by * getattr(row, price)
    return Point(row.method, row.ratio, row.score, low, high, cost)


def save_plots(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write the figures as PNG files."""
    return [save(plot.figure, folder / f"{plot.name}.png") for plot in plots]


def write_html(sweep: Sweep, rows: Sequence[Row], plots: Sequence[Plot], path: Path, reference: bool = False) -> Path:
    """Write the report: the table, the plots by task, what failed, published numbers, and what it was made with."""
    from tokprune.viz.html import write

    return write(page(sweep, rows, plots, reference), path)


def page(sweep: Sweep, rows: Sequence[Row], plots: Sequence[Plot], reference: bool = False) -> Page:
    """The report as a page."""
    from tokprune.viz.html import Page, PagePicture, Section, Table

    columns = used_columns(rows)
    table = Table([c.head for c in columns], [[_sortable(c, row) for c in columns] for row in rows])
    notes = "\n".join(f"- {note}" for note in caption(rows).splitlines())
    tables = [table, *(Table(other.heads, other.body, other.title) for other in details(sweep))]
    sections = [Section("Results", notes, tables)]
    for task in dict.fromkeys(p.task for p in plots):
        pictures = [PagePicture(png(p.figure), p.text, f"{p.task}: {p.text}") for p in plots if p.task == task]
        sections.append(Section(task, "", (), pictures))
    if sweep.failures:
        lines = [(str(f.cell), f.error, f.reason) for f in sweep.failures]
        sections.append(Section("Failed cells", "", [Table(("cell", "error", "reason"), lines)]))
    if reference:
        from tokprune.evaluation.reference.beside import beside

        published = beside(sweep)
        beside_it = [Table(published.heads, published.body)] if published.body else []
        sections.append(Section(published.title, published.notes, beside_it))
    settings = {k: v for k, v in sweep.settings.to_dict().items() if v not in (None, {})}
    environment = {k: v for k, v in {**settings, **sweep.environment}.items() if v is not None}
    return Page(f"What pruning loses: {sweep.settings.model}", command_line(), environment, sections)


def _sortable(column: ResultColumn, row: Row) -> object:
    """The text of a cell with the number to sort it by."""
    from tokprune.viz.html import Value

    text, number = column.text(row), column.number(row)
    return text or None if number is None else Value(text, float(number))
