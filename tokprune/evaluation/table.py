"""The table of a sweep: a row per cell with its score, its loss against the unpruned run and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tokprune.evaluation.cells import CellResult
from tokprune.evaluation.significance import Paired, compare, holm
from tokprune.evaluation.sweep import Sweep

#: Names under which results hold the mean visual tokens per question, kept and in all, and the FLOPs of an answer.
KEPT, TOTAL, FLOPS, TTFT = "visual_tokens_kept", "visual_tokens_total", "flops", "ttft_ms"


@dataclass(frozen=True)
class Row:
    """A cell as numbers.

    score: the task's main metric, in percent where questions score between 0 and 1. paired: the comparison with the
    baseline of the same task, in points (hundredths) where `percent`; None for the baseline, without one, or where
    single questions have no score. p_holm: its p corrected for all comparisons of the table. note: why a number is
    missing.
    """

    task: str
    method: str
    ratio: float
    metric: str
    score: float
    percent: bool
    questions: int
    kept: float | None = None
    total: float | None = None
    flops: float | None = None
    ttft_ms: float | None = None
    seconds: float | None = None
    paired: Paired | None = None
    p_holm: float | None = None
    note: str = ""


def rows_of(sweep: Sweep) -> list[Row]:
    """The rows of a sweep, with Holm's correction over all its comparisons."""
    rows = []
    for result in sweep.results:
        base = sweep.baseline(result.cell.task)
        row = row_of(result) if base is None or result is base else row_of(result, *pair(base, result))
        if result.cell.method in sweep.settings.prompt_budgets and row.kept and row.total:
            row = replace(row, ratio=row.kept / row.total)  # what the budget came to
        rows.append(row)
    return corrected(rows)


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with their p values corrected for being looked at together."""
    at = [i for i, r in enumerate(rows) if r.paired is not None]
    adjusted = dict(zip(at, holm([rows[i].paired.p for i in at]), strict=True))  # type: ignore[union-attr]
    return [replace(r, p_holm=adjusted.get(i)) for i, r in enumerate(rows)]


def row_of(result: CellResult, paired: Paired | None = None, note: str = "") -> Row:
    """A cell as a row."""
    value = result.metrics[result.main]
    percent = is_percent(scores_of(result, result.main).values(), value)
    blind = sum(s.costs.get(TOTAL) == 0 for s in result.samples)
    if blind:  # text-only rows belong to some benchmarks; in others they are a fault of the data
        note = "; ".join(part for part in (note, f"{blind} questions came without a picture") if part)
    cell, costs, timing = result.cell, result.costs, result.timing
    return Row(
        cell.task,
        cell.method,
        cell.ratio,
        metric=result.main,
        score=100 * value if percent else value,
        percent=percent,
        questions=len({s.id for s in result.samples}),
        kept=costs.get(KEPT),
        total=costs.get(TOTAL),
        flops=costs.get(FLOPS),
        ttft_ms=timing.get(TTFT),
        seconds=timing.get("seconds"),
        paired=paired,
        note=note,
    )


def pair(base: CellResult, other: CellResult) -> tuple[Paired | None, str]:
    """The paired comparison of two cells of one task, or the reason why there is none."""
    if base.main != other.main:
        return None, f"no comparison: {base.main} there, {other.main} here"
    a, b = scores_of(base, base.main), scores_of(other, other.main)
    if not a or not b:
        return None, f"no comparison: {other.main} is not scored question by question"
    if not a.keys() & b.keys():
        return None, "no comparison: the two runs share no question"
    paired = compare(a, b)  # type: ignore[arg-type]  # a key of two is hashable
    note = f"{paired.unpaired} questions only in one run, left out" if paired.unpaired else ""
    return paired, note


def scores_of(result: CellResult, metric: str) -> dict[tuple[str, int], float]:
    """Question -> score by a metric; a question asked several times counts with its mean."""
    by_question: dict[tuple[str, int], list[float]] = {}
    for sample in result.samples:
        if metric in sample.scores:
            by_question.setdefault(sample.id, []).append(sample.scores[metric])
    return {q: sum(v) / len(v) for q, v in by_question.items()}


def is_percent(scores: Iterable[float], value: float) -> bool:
    """Whether a metric is a share: its value and all single scores lie between 0 and 1."""
    return 0 <= value <= 1 and all(0 <= s <= 1 for s in scores)


def score_text(row: Row) -> str:
    """ "81.3 %", or the plain number of a metric that is no share."""
    return f"{row.score:.1f} %" if row.percent else f"{row.score:.4g}"


def scale(row: Row) -> float:
    """What turns differences of single scores into the unit of the row: 100 for points."""
    return 100.0 if row.percent or (row.paired is not None and _share(row.paired)) else 1.0


def _share(paired: Paired) -> bool:
    return 0 <= paired.base <= 1 and 0 <= paired.mean <= 1


def difference_text(row: Row) -> str:
    """ "-3.2 [-5.0, -1.5]": the paired difference and its interval, in points."""
    if row.paired is None:
        return ""
    by = scale(row)
    d, low, high = (by * x for x in (row.paired.difference, row.paired.low, row.paired.high))
    return f"{d:+.1f} [{low:+.1f}, {high:+.1f}]" if by == 100 else f"{d:+.3g} [{low:+.3g}, {high:+.3g}]"


def p_text(p: float | None) -> str:
    """A p value for people; below a ten-thousandth the digits say nothing more."""
    if p is None:
        return ""
    return "<0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.01 else f"{p:.3f}"


def tokens_text(row: Row) -> str:
    """ "58/576", as far as known."""
    if row.kept is None:
        return ""
    return f"{row.kept:.0f}" + (f"/{row.total:.0f}" if row.total is not None else "")
