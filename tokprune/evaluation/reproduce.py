"""Published tables as recipes that run: which model, task, tokens and number were published, and what comes out here.

A recipe is a table of `reference/` (or rows of its own in recipes.json) whose rows are methods that we have, at keep
ratios, on tasks of lmms-eval. What cannot be run says why.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokprune.errors import OptionError, nearest
from tokprune.evaluation.cells import BASELINE, OPTION, Cell, CellResult
from tokprune.evaluation.reference.beside import measured
from tokprune.evaluation.reference.tables import Benchmark, Entry, Model, PublishedTable, models
from tokprune.evaluation.significance import paired_bootstrap
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import is_percent, scores_of
from tokprune.files import checked
from tokprune.registry import list_methods, method_class
from tokprune.types import JsonObject

TYPE, VERSION = "tokprune.reproduce", 1
POINTS = 1.0  # a number this near to the published one agrees; …
SHARE = 0.01  # … or this share of it, where it is more than 100
AGREES, DIFFERS, UNDECIDED, NOT_RUN = "agrees", "differs", "undecided", "not run"


@dataclass(frozen=True)
class RecipeRow:
    """A row of a table: our method at a keep ratio, and the published values, one per benchmark."""

    label: str
    method: str
    ratio: float
    values: tuple[float | None, ...]
    options: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A published table that can be run. missing: why it cannot, "" where it can. settings: of `SweepSettings`."""

    name: str
    title: str
    checkpoint: str
    source: str
    url: str = ""
    note: str = ""
    benchmarks: tuple[Benchmark, ...] = ()
    rows: tuple[RecipeRow, ...] = ()
    settings: JsonObject = field(default_factory=dict)
    missing: str = ""

    @property
    def tasks(self) -> list[str]:
        """The lmms-eval tasks of its benchmarks."""
        return list(dict.fromkeys(b.task for b in self.benchmarks if b.task))

    def cells(self, tasks: Sequence[str] = ()) -> list[Cell]:
        """What has to be run: the baseline and every row on every task (or on `tasks` alone)."""
        wanted = [t for t in self.tasks if not tasks or t in tasks]
        if not wanted:
            raise OptionError(
                f"recipe {self.name} has none of the tasks {list(tasks)}; it has {', '.join(self.tasks)}."
            )
        return [Cell(t, m, r) for t in wanted for m, r in dict.fromkeys((row.method, row.ratio) for row in self.rows)]

    def options(self) -> JsonObject:
        """The methods' options as model_args of a sweep."""
        return {f"{OPTION}{row.method}.{k}": v for row in self.rows for k, v in row.options.items()}


@dataclass(frozen=True)
class Outcome:
    """One published number and ours beside it, in the published unit. low, high: the interval of ours, where single
    questions have scores. verdict: AGREES, DIFFERS, UNDECIDED (too few questions) or NOT_RUN; why: of the last."""

    benchmark: str
    label: str
    published: float
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    questions: int = 0
    verdict: str = NOT_RUN
    why: str = ""


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name: those of recipes.json, then every other table of `reference/` that can be run."""
    data = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))
    checked(data, "tokprune.recipes", 1, "the recipes")
    named = [_recipe(entry) for entry in data["recipes"]]
    taken = {entry.get("table") for entry in data["recipes"]}
    others = [_of_table(f"{m.name}/{t.id}", m, t, {}) for m in models().values() for t in m.tables]
    others = [r for r in others if not r.missing and r.name not in taken]
    return {r.name: r for r in [*named, *others]}


def find(name: str) -> Recipe:
    """The recipe called `name`; raises OptionError with the nearest one, and for one that cannot be run."""
    known = recipes()
    if name not in known:
        raise OptionError(f"there is no recipe {name!r}.{nearest(name, known)} tokprune reproduce lists them.")
    if known[name].missing:
        raise OptionError(f"recipe {name} cannot be run: {known[name].missing}.")
    return known[name]


def _recipe(entry: JsonObject) -> Recipe:
    if "table" in entry:
        model_name, _, table_id = entry["table"].partition("/")
        model = models()[model_name]
        return _of_table(entry["name"], model, next(t for t in model.tables if t.id == table_id), entry)
    benchmarks = tuple(map(Benchmark.of, entry["benchmarks"]))
    rows = tuple(RecipeRow(**{**row, "values": tuple(row["values"])}) for row in entry["rows"])
    return Recipe(**{**entry, "benchmarks": benchmarks, "rows": rows})


def _of_table(name: str, model: Model, table: PublishedTable, more: JsonObject) -> Recipe:
    """A table as a recipe. more: what recipes.json adds: methods to keep, rows that are spelled out, settings."""
    at = [i for i, b in enumerate(table.benchmarks) if b.task and b.metrics]
    said = {row["label"]: row for row in more.get("rows", ())}
    rows = [row for e in table.entries if (row := _row(e, at, said.get(e.label), more.get("methods", ()))) is not None]
    missing = more.get("missing", "")
    if not missing and not (at and any(r.method != BASELINE for r in rows)):
        missing = "none of its rows is a method of ours at a keep ratio on a task of lmms-eval"
    if not missing and not model.checkpoints:
        missing = "its model is not on the hub"
    return Recipe(
        name,
        f"{model.title}: {table.source}",
        model.checkpoints[0] if model.checkpoints else "",
        table.source,
        table.url,
        " ".join(part for part in (table.note, more.get("note", "")) if part),
        tuple(table.benchmarks[i] for i in at),
        () if missing else tuple(rows),
        more.get("settings", {}),
        missing,
    )


def _row(entry: Entry, at: Sequence[int], said: Mapping[str, object] | None, only: Sequence[str]) -> RecipeRow | None:
    """A row that can be run, else None: methods inside the LLM count their tokens in other ways in every paper, and
    are run where recipes.json spells them out."""
    values = tuple(entry.values[i] for i in at)
    if all(v is None for v in values):
        return None
    if entry.method == BASELINE:
        return RecipeRow(entry.label, BASELINE, 1.0, values)
    if said is not None:
        options: JsonObject = dict(said.get("options", {}))  # type: ignore[call-overload]
        return RecipeRow(entry.label, str(said["method"]), float(str(said["ratio"])), values, options)
    if entry.method not in list_methods() or entry.ratio is None or not 0 < entry.ratio < 1:
        return None
    if method_class(entry.method).stage not in ("connector", "frames") or (only and entry.method not in only):
        return None
    return RecipeRow(entry.label, entry.method, entry.ratio, values)


def outcomes(recipe: Recipe, sweep: Sweep) -> list[Outcome]:
    """Every published number of the tasks that were run, with ours beside it."""
    results = {r.cell: r for r in sweep.results}
    failed = {f.cell: f.reason for f in sweep.failures}
    tasks = {cell.task for cell in (*results, *failed)}
    out = []
    for i, benchmark in enumerate(recipe.benchmarks):
        for row in recipe.rows:
            published = row.values[i]
            if published is None or benchmark.task not in tasks:
                continue
            cell = Cell(str(benchmark.task), row.method, row.ratio)
            result, label = results.get(cell), f"{row.label} at {row.ratio:.3g}"
            ours = None if result is None else measured(benchmark, result)
            if result is None or ours is None:
                why = failed.get(cell) or f"the task gave no {' + '.join(benchmark.metrics)}"
                out.append(Outcome(benchmark.name, label, published, why=why))
                continue
            low, high = interval(benchmark, result)
            part = sweep.settings.limit not in (None, recipe.settings.get("limit"))
            said = verdict(published, ours, (low, high) if part else None)
            count = len(scores_of(result, result.main))
            out.append(Outcome(benchmark.name, label, published, ours, low, high, count, said))
    return out


def verdict(published: float, ours: float, part: tuple[float | None, float | None] | None = None) -> str:
    """Whether our number is the published one. part: its interval (or two None), where only a part of the questions
    was asked: they can contradict a number, and confirm it where the interval is narrow. All of them are the same
    questions, so that their number is no excuse."""
    near = max(POINTS, SHARE * abs(published))
    if part is None:
        return AGREES if abs(ours - published) <= near else DIFFERS
    low, high = part
    if low is None or high is None:
        return UNDECIDED
    if not low <= published <= high:
        return DIFFERS
    return AGREES if high - low <= 2 * near else UNDECIDED


def interval(benchmark: Benchmark, result: CellResult) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean over questions, in the published unit; none for metrics that are no mean."""
    if len(benchmark.metrics) != 1:
        return None, None
    scores = list(scores_of(result, benchmark.metrics[0]).values())
    value = result.metrics.get(benchmark.metrics[0], math.nan)
    if not scores or abs(sum(scores) / len(scores) - value) > 1e-6 * max(1.0, abs(value)):
        return None, None
    if set(scores) <= {0.0, 1.0} and is_percent(scores, value):
        low, high = wilson(sum(scores), len(scores))
    else:
        low, high = paired_bootstrap(scores)
    return benchmark.scale * low, benchmark.scale * high


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927)."""
    z2 = 1.959964**2
    middle, half = right + z2 / 2, math.sqrt(z2 * (right * (n - right) / n + z2 / 4))
    return (middle - half) / (n + z2), (middle + half) / (n + z2)
