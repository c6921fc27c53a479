"""Sets a user's run beside what was published of the same model, method, budget and benchmark."""

from __future__ import annotations

from tokprune.evaluation.cells import CellResult
from tokprune.evaluation.export import Framed
from tokprune.evaluation.reference.render import label, value_text
from tokprune.evaluation.reference.tables import Benchmark, Entry, Model, model_of, models
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import KEPT

NEAR = 0.1  # budgets within a tenth of each other are set side by side
WORDS = ("benchmark", "method", "as", "source")
COLUMNS = ("benchmark", "method", "kept", "this run", "published", "as", "source")


def beside(sweep: Sweep) -> Framed:
    """What was published of the cells of a run; the notes say why nothing is, or what to mind."""
    model, limit = model_of(sweep.settings.model), sweep.settings.limit
    if model is None:
        known = ", ".join(m.checkpoints[0] for m in models().values() if m.checkpoints)
        why = f"There are none for {sweep.settings.model}. There are for: {known}."
        return Framed("Published numbers", COLUMNS, [], WORDS, why)
    rows = [row for result in sweep.results for row in _rows(model, result)]
    if not rows:
        tasks = sorted({b.task for t in model.tables for b in t.benchmarks if b.task})
        note = f"None at the tasks, methods and ratios of this run. There are for the tasks {', '.join(tasks)}."
    else:
        note = f"Budgets within {NEAR:.0%}. Prompts and metrics of the sources differ; docs/reference.md says how."
        note += "" if limit is None else f" This run asked {limit} questions per task only."
    return Framed(f"Published numbers of {model.title}", COLUMNS, rows, WORDS, note)


def _rows(model: Model, result: CellResult) -> list[list[str]]:
    out = []
    kept = result.costs.get(KEPT)
    amount = f"{kept:.0f}" if kept is not None else f"{100 * result.cell.ratio:.3g} %"
    for table in model.tables:
        source = table.source.partition(":")[0]
        for i, benchmark in enumerate(table.benchmarks):
            ours = measured(benchmark, result)
            if ours is None:
                continue
            start = [benchmark.name, result.cell.method, amount, f"{ours:.4g}"]
            for entry in table.entries:
                if entry.values[i] is not None and same_cell(entry, result):
                    out.append([*start, value_text(entry.values[i]), label(entry), source])
    return out


def measured(benchmark: Benchmark, result: CellResult) -> float | None:
    """A run's number in the unit of a benchmark, if it ran that task and all its metrics."""
    if benchmark.task != result.cell.task or not all(m in result.metrics for m in benchmark.metrics):
        return None
    return benchmark.scale * sum(result.metrics[m] for m in benchmark.metrics)


def same_cell(entry: Entry, result: CellResult) -> bool:
    """Whether a published row is about the same method at about the same budget."""
    if entry.method != result.cell.method:
        return False
    if result.cell.baseline:
        return True
    kept = result.costs.get(KEPT)
    if entry.tokens is not None and kept is not None:
        return abs(kept - entry.tokens) <= NEAR * entry.tokens
    return entry.ratio is not None and abs(result.cell.ratio - entry.ratio) <= NEAR * entry.ratio
