"""A sweep's table for the terminal, and as CSV, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokprune.evaluation.cells import BASELINE
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import Row, difference_text, is_percent, p_text, scale, score_text, tokens_text
from tokprune.files import write_text
from tokprune.profiling.report import flops_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class ResultColumn:
    """A column of the table for people."""

    head: str
    text: Callable[[Row], str]
    number: Callable[[Row], float | None] = lambda row: None
    """What the column sorts by."""


COLUMNS = (
    ResultColumn("task", lambda r: r.task),
    ResultColumn("method", lambda r: r.method),
    ResultColumn("keep", lambda r: f"{100 * r.ratio:.4g} %", lambda r: r.ratio),
    ResultColumn("tokens", tokens_text, lambda r: r.kept),
    ResultColumn("score", score_text, lambda r: r.score),
    ResultColumn("difference [95 % CI]", difference_text, lambda r: r.paired.difference if r.paired else None),
    ResultColumn("p", lambda r: p_text(r.paired.p if r.paired else None), lambda r: r.paired.p if r.paired else None),
    ResultColumn("p (Holm)", lambda r: p_text(r.p_holm), lambda r: r.p_holm),
    ResultColumn(
        "FLOPs", lambda r: "" if r.flops is None else flops_text(r.flops).removesuffix("FLOPs"), lambda r: r.flops
    ),
    ResultColumn("TTFT", lambda r: "" if r.ttft_ms is None else f"{r.ttft_ms:.3g} ms", lambda r: r.ttft_ms),
)
LEFT = ("task", "method")
BESIDE = 2  # characters that a column takes beside its text
NARROW = ("task", "p")  # not in the terminal: the task stands above, and one p is enough there


def used_columns(rows: Sequence[Row], without: Sequence[str] = ()) -> list[ResultColumn]:
    """The columns with any entry."""
    return [c for c in COLUMNS if c.head not in without and any(c.text(row) for row in rows)]


def texts(rows: Sequence[Row], without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Heads and texts of the table, without empty columns."""
    columns = used_columns(rows, without)
    return [c.head for c in columns], [[c.text(row) for c in columns] for row in rows]


@dataclass(frozen=True)
class Framed:
    """A table for the terminal that never breaks a number: where there is no room it goes on below, words repeated."""

    title: str
    heads: Sequence[str]
    body: Sequence[Sequence[str]]
    left: Sequence[str]
    """Heads of the columns that hold words."""
    notes: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="bold")
        if self.body:
            yield from (self._table(columns, options.max_width) for columns in self.columns_for(options.max_width))
        if self.notes:
            yield Text(self.notes, style="dim")

    def width(self, column: int, most: int) -> int:
        """Of a column: its longest number, or its words up to `most`."""
        longest = max([len(line[column]) for line in self.body], default=0)
        head = self.heads[column]
        if head in self.left:
            return min(max(longest, len(head)), most)
        return max(longest, *(len(word) for word in head.split()), 1)

    def columns_for(self, width: int) -> list[list[int]]:
        """The columns of each part of the table, in a terminal of `width`."""
        words = [i for i, head in enumerate(self.heads) if head in self.left]
        taken = sum(self.width(i, width // 3) + BESIDE for i in words) + 1
        parts: list[list[int]] = [[*words]]
        room = width - taken
        for i in range(len(self.heads)):
            if i in words:
                continue
            need = self.width(i, width) + BESIDE
            if need > room and len(parts[-1]) > len(words):
                parts.append([*words])
                room = width - taken
            parts[-1].append(i)
            room -= need
        return parts

    def _table(self, columns: Sequence[int], width: int) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in columns:
            side: Literal["left", "right"] = "left" if self.heads[i] in self.left else "right"
            table.add_column(Text(self.heads[i]), justify=side, overflow="fold", width=self.width(i, width // 3))
        for line in self.body:
            table.add_row(*(Text(line[i]) for i in columns))
        return table


def terminal(rows: Sequence[Row], title: str = "") -> Group:
    """A table per task for rich, narrow enough for 80 columns, and the notes below."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    for task in dict.fromkeys(r.task for r in rows):
        heads, body = texts([r for r in rows if r.task == task], NARROW)
        parts.append(Framed(f"{task}, {title}" if title else task, heads, body, LEFT))
    return Group(*parts, Text(caption(rows), style="dim"))


def details(sweep: Sweep) -> list[Framed]:
    """For each task with several metrics a table of those that are not the main one.

    These are question types or subtasks, of which some lose far more than the mean shows.
    """
    out = []
    for task in sweep.tasks:
        mine = [r for r in sweep.results if r.cell.task == task]
        names = [m for m in dict.fromkeys(m for r in mine for m in r.metrics) if m != mine[0].main]
        if not names:
            continue
        percent = {m: is_percent((), max(r.metrics.get(m, 0.0) for r in mine)) for m in names}
        shown = [[_metric_text(r.metrics.get(m), percent[m]) for m in names] for r in mine]
        body = [[r.cell.method, f"{100 * r.cell.ratio:.4g} %", *row] for r, row in zip(mine, shown, strict=True)]
        heads = [m.removeprefix(f"{task}_").partition("/")[0] for m in names]
        out.append(Framed(f"{task}, other metrics", ["method", "keep", *heads], body, LEFT))
    return out


def _metric_text(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if percent else f"{value:.4g}"


def caption(rows: Sequence[Row], against: str = BASELINE) -> str:
    """What the columns mean, and what is missing why. against: what the differences are to."""
    out = []
    metrics = {r.task: r.metric for r in rows}
    out.append("score: " + ", ".join(f"{metric} ({task})" for task, metric in metrics.items()))
    compared = [r for r in rows if r.paired is not None]
    if compared:
        tests = {
            "mcnemar": "exact McNemar test",
            "permutation": "sign-flip permutation",
            "sign flips": "sign flips, all",
        }
        used = ", ".join(tests[t] for t in dict.fromkeys(r.paired.test for r in compared if r.paired))
        out.append(
            f"difference: against {against}, over the same questions, in points; paired bootstrap; p: {used}; "
            f"p (Holm): for {len(compared)} comparisons at once"
        )
    out += dict.fromkeys(f"{r.task}, {r.method} at {r.ratio:g}: {r.note}" for r in rows if r.note)
    if rows and against == BASELINE and not any(r.method == BASELINE for r in rows):
        out.append("no baseline: add none to --methods to see what is lost")
    return "\n".join(out)


CSV_HEADS = (
    *("task", "method", "ratio", "metric", "score", "questions", "tokens_kept", "tokens_total", "flops", "ttft_ms"),
    *("difference", "ci_low", "ci_high", "p", "p_holm", "test", "better", "worse", "note"),
)


def to_csv(rows: Sequence[Row], against: str = BASELINE) -> str:
    """Numbers for other programs: one line per cell, empty where a number is missing."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_HEADS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        numbers = {**vars(row), "tokens_kept": row.kept, "tokens_total": row.total}
        if row.paired is not None:
            p, by = row.paired, scale(row)
            numbers |= {**vars(p), "difference": by * p.difference, "ci_low": by * p.low, "ci_high": by * p.high}
        writer.writerow(numbers)
    return out.getvalue()


def to_markdown(rows: Sequence[Row], against: str = BASELINE) -> str:
    """A pipe table with its caption below."""
    heads, body = texts(rows)
    notes = (f"{part}  " for part in caption(rows, against).splitlines())
    return "\n".join([*pipe_table(heads, body), "", *notes]) + "\n"


def pipe_table(heads: Sequence[str], body: Iterable[Sequence[str]], left: Sequence[str] = LEFT) -> list[str]:
    """The lines of a Markdown table. left: heads of the columns that hold words."""
    rule = "|" + "".join("---|" if head in left else "---:|" for head in heads)
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (heads, *body)]
    return [rows[0], rule, *rows[1:]]


def to_latex(rows: Sequence[Row], against: str = BASELINE) -> str:
    """A `tabular` for the booktabs package, with the caption as comments."""
    heads, body = texts(rows)
    lines = [f"% {part}" for part in caption(rows, against).splitlines()]
    lines += [
        r"\begin{tabular}{" + "".join("l" if h in LEFT else "r" for h in heads) + "}",
        r"\toprule",
        " & ".join(map(_tex, heads)) + r" \\",
        r"\midrule",
    ]
    last = None
    for row, line in zip(rows, body, strict=True):
        if last is not None and row.task != last:
            lines.append(r"\midrule")
        last = row.task
        lines.append(" & ".join(map(_tex, line)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


WRITERS: dict[str, Callable[[Sequence[Row], str], str]] = {"csv": to_csv, "markdown": to_markdown, "latex": to_latex}


def write(rows: Sequence[Row], kind: str, path: str | Path, against: str = BASELINE) -> Path:
    """Write the table as `kind` (csv, markdown or latex). against: what the differences are to."""
    return write_text(path, WRITERS[kind](rows, against))
