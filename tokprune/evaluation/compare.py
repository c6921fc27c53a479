"""Two runs side by side, question by question: other code, another version, another machine, the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokprune.errors import OptionError
from tokprune.evaluation.cells import CellResult
from tokprune.evaluation.export import Framed
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import Row, corrected, difference_text, p_text, pair, row_of, score_text
from tokprune.types import JsonObject


@dataclass(frozen=True)
class Comparison:
    """Rows of the second run with the first as their base, the rows of the first, and what found no partner."""

    rows: list[Row]
    first: list[Row]
    changes: list[str]
    alone: list[str]

    def table(self, first: str = "first", second: str = "second") -> Framed:
        """The comparison for rich."""
        heads = ("task", "method", "keep", "first", "second", "difference [95 % CI]", "p", "p (Holm)")
        body = []
        for a, b in zip(self.first, self.rows, strict=True):
            p = "" if b.paired is None else p_text(b.paired.p)
            ratios = f"{b.ratio:.4g}" if a.ratio == b.ratio else f"{a.ratio:.4g}, {b.ratio:.4g}"
            method = b.method if a.method == b.method else f"{a.method}, {b.method}"
            body.append([b.task, method, ratios, score_text(a), score_text(b), difference_text(b), p, p_text(b.p_holm)])
        notes = [
            f"first: {first}",
            f"second: {second}",
            "difference: second minus first over the same questions, in points",
            *(f"differs: {change}" for change in self.changes),
            *(f"only in one run: {name}" for name in self.alone),
            *(f"{r.task}, {r.method} at {r.ratio:g}: {r.note}" for r in self.rows if r.note),
        ]
        return Framed("", heads, body, ("task", "method"), "\n".join(notes))


def compare_sweeps(first: Sweep, second: Sweep) -> Comparison:
    """Pair the cells of two runs by task, method and ratio; where each run has one cell of a task, these two.

    Raises OptionError when no cell of one run has a partner in the other.
    """
    pairs = _partners(first.results, second.results)
    if not pairs:
        raise OptionError(
            f"the two runs have no cell in common. First: {_names(first.results)}. Second: {_names(second.results)}."
        )
    met = {id(r) for both in pairs for r in both}
    alone = [str(r.cell) for r in [*first.results, *second.results] if id(r) not in met]
    rows = corrected([row_of(b, *pair(a, b)) for a, b in pairs])
    return Comparison(rows, [row_of(a) for a, _ in pairs], changes(first, second), alone)


def _partners(first: Sequence[CellResult], second: Sequence[CellResult]) -> list[tuple[CellResult, CellResult]]:
    by_cell = {r.cell: r for r in first}
    exact = [(by_cell[r.cell], r) for r in second if r.cell in by_cell]
    if exact:
        return exact
    out = []
    for b in second:
        theirs, ours = ([r for r in run if r.cell.task == b.cell.task] for run in (first, second))
        if len(theirs) == len(ours) == 1:
            out.append((theirs[0], b))
    return out


def changes(first: Sweep, second: Sweep) -> list[str]:
    """What else differs between two runs: settings, versions, machine."""
    a: JsonObject = {**first.environment, **first.settings.to_dict()}
    b: JsonObject = {**second.environment, **second.settings.to_dict()}
    return [f"{name}: {a.get(name)} then {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]


def _names(results: Sequence[CellResult]) -> str:
    return "; ".join(str(r.cell) for r in results) or "none"
