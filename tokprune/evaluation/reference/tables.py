"""The published numbers: read from the JSON files beside this module, found by model, method and task."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokprune.errors import OptionError, nearest, unknown
from tokprune.files import checked
from tokprune.types import Fields, JsonObject

TYPE, VERSION = "tokprune.reference", 1
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A row of a published table. method: our name where we have it. tokens: visual tokens kept; ratio: their share."""

    label: str
    method: str
    values: tuple[float | None, ...]
    tokens: int | None = None
    ratio: float | None = None
    note: str = ""

    @property
    def amount(self) -> str:
        """ "64" or "22.2 %", as published."""
        if self.tokens is not None:
            return str(self.tokens)
        return "" if self.ratio is None else f"{100 * self.ratio:.4g} %"


@dataclass(frozen=True)
class Benchmark:
    """A column: the lmms-eval task and metrics (their sum) that measure it; scale: into the published unit."""

    name: str
    task: str | None = None
    metrics: tuple[str, ...] = ()
    scale: float = 1.0
    note: str = ""

    @staticmethod
    def of(data: Fields) -> Benchmark:
        """The column that a JSON file describes."""
        return Benchmark(**{**data, "metrics": tuple(data.get("metrics", ()))})


@dataclass(frozen=True)
class PublishedTable:
    """One table of one source about one model."""

    id: str
    model: str
    source: str
    benchmarks: tuple[Benchmark, ...]
    entries: tuple[Entry, ...]
    url: str = ""
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of the benchmarks."""
        return [b.name for b in self.benchmarks]


@dataclass(frozen=True)
class Model:
    """A model with its published tables. checkpoints: where it lies on the hub. claims: numbers that are no rows."""

    name: str
    title: str
    checkpoints: tuple[str, ...]
    tables: tuple[PublishedTable, ...]
    visual_tokens: int | None = None
    note: str = ""
    claims: tuple[str, ...] = ()


def known_model(name: str) -> bool:
    """Whether `name` is a model of the tables, such as llava-1.5-7b, and not a checkpoint to load."""
    return name.lower() in models()


def model_of(checkpoint: str) -> Model | None:
    """The model whose checkpoint (or a local copy of it, by its folder's name) is given."""
    last = checkpoint.rstrip("/").rpartition("/")[2].lower()
    for model in models().values():
        if last == model.name or last in {c.rpartition("/")[2].lower() for c in model.checkpoints}:
            return model
    return None


def select(model: str | None = None, methods: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[Model]:
    """Models with their tables, reduced to what is asked for; the unpruned rows stay beside the methods.

    methods: our names or published ones. tasks: lmms-eval names or published benchmarks. Raises OptionError, with the
    nearest name, for one that no table has.
    """
    everything = models()
    if model is not None and model.lower() not in everything:
        raise unknown("model of the reference tables", model, everything)
    chosen = list(everything.values()) if model is None else [everything[model.lower()]]
    rows = [e for m in everything.values() for t in m.tables for e in t.entries]
    wanted = {m.lower().replace("-", "_") for m in methods}
    _check("method", wanted, {e.method for e in rows} | {e.label.lower().replace("-", "_") for e in rows})
    columns = [b for m in everything.values() for t in m.tables for b in t.benchmarks]
    wanted_tasks = {t.lower() for t in tasks}
    _check("task", wanted_tasks, {b.name.lower() for b in columns} | {b.task for b in columns if b.task})
    out = []
    for candidate in chosen:
        tables = [t for t in (_reduced(t, wanted, wanted_tasks) for t in candidate.tables) if t is not None]
        if tables:
            out.append(replace(candidate, tables=tuple(tables)))
    if not out:
        raise OptionError(
            "no published table has all of that together; leave --model, --methods or --tasks out to see more."
        )
    return out


def _check(what: str, names: set[str], known: set[str]) -> None:
    for name in sorted(names - known):
        raise OptionError(f"no published table has the {what} {name!r}.{nearest(name, known)}")


def _reduced(table: PublishedTable, methods: set[str], tasks: set[str]) -> PublishedTable | None:
    """A table with the rows and columns asked for; None when nothing of it is left."""
    entries = [
        e
        for e in table.entries
        if not methods or e.method in methods or e.label.lower().replace("-", "_") in methods or e.method == "none"
    ]
    if methods != {"none"} and methods and all(e.method == "none" for e in entries):
        return None  # nothing but the full model
    at = [i for i, b in enumerate(table.benchmarks) if not tasks or b.name.lower() in tasks or b.task in tasks]
    entries = [replace(e, values=tuple(e.values[i] for i in at)) for e in entries]
    entries = [e for e in entries if any(v is not None for v in e.values)]
    if not at or not entries:
        return None
    return replace(table, benchmarks=tuple(table.benchmarks[i] for i in at), entries=tuple(entries))


@functools.cache
def models() -> dict[str, Model]:
    """Every model with published numbers, by name."""
    names = _read("names.json")
    files = sorted(f.name for f in FOLDER.iterdir() if f.name.endswith(".json") and f.name != "names.json")
    parsed = [_model(file, _read(file), names) for file in files]
    return {m.name: m for m in parsed}


def _read(file: str) -> JsonObject:
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def _model(file: str, data: JsonObject, names: JsonObject) -> Model:
    checked(data, TYPE, VERSION, f"a reference table ({file})")
    tables = []
    for t in data["tables"]:
        benchmarks = tuple(Benchmark.of({"name": c, **names["benchmarks"].get(c, {})}) for c in t["columns"])
        for row in t["rows"]:
            if len(row["values"]) != len(benchmarks):
                raise OptionError(f"{file}, table {t['id']}: {row['label']} has {len(row['values'])} values.")
        entries = tuple(_entry(row, names["methods"], data.get("visual_tokens")) for row in t["rows"])
        about = {k: t[k] for k in ("id", "source", "url", "note") if k in t}
        tables.append(PublishedTable(model=data["model"], benchmarks=benchmarks, entries=entries, **about))
    about = {k: data[k] for k in ("title", "visual_tokens", "note") if k in data}
    sites, claims = tuple(data["checkpoints"]), tuple(data.get("claims", ()))
    return Model(data["model"], checkpoints=sites, tables=tuple(tables), claims=claims, **about)


def _entry(row: JsonObject, methods: JsonObject, full: int | None) -> Entry:
    tokens, ratio = row.get("tokens"), row.get("keep")
    if ratio is None and tokens is not None and full:
        ratio = tokens / full
    method = methods.get(row["label"], row["label"].lower().replace("-", "_").replace(" ", "_"))
    return Entry(row["label"], method, tuple(row["values"]), tokens, ratio, row.get("note", ""))
