"""results.json: all that a sweep found, as one versioned file that a repeated run reproduces byte for byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokprune.config import method_to_dict
from tokprune.evaluation.cells import BASELINE, Cell, CellResult, SweepSettings, build_methods, key
from tokprune.evaluation.errors import Failure
from tokprune.evaluation.store import dump
from tokprune.evaluation.sweep import Sweep
from tokprune.evaluation.table import Row, rows_of
from tokprune.files import checked, read_json
from tokprune.types import JsonObject

TYPE, VERSION = "tokprune.eval", 1
TIMING_TYPE = "tokprune.eval.timing"
SEEDED = ("python", "numpy", "torch", "fewshot", "method")


def results_json(sweep: Sweep, command: Sequence[str] = ()) -> str:
    """The canonical file: nothing in it depends on the clock, or on whether the sweep was interrupted."""
    cells = [
        {"key": key(r.cell, sweep.settings), **r.to_dict(), "samples": [vars(s) for s in r.samples]}
        for r in sweep.results
    ]
    data = {
        "type": TYPE,
        "version": VERSION,
        "command": list(command),
        "settings": sweep.settings.to_dict(),
        "seeds": dict.fromkeys(SEEDED, sweep.settings.seed),
        "environment": sweep.environment,
        "methods": methods_of(sweep),
        "cells": cells,
        "comparisons": [_comparison(row) for row in rows_of(sweep) if row.paired is not None],
        "failed": [{**dataclasses.asdict(f.cell), "error": f.error, "reason": f.reason} for f in sweep.failures],
    }
    return dump(data)


def timing_json(sweep: Sweep) -> str:
    """What the clock decided: seconds of each cell, time to first token, throughput."""
    cells = [{**dataclasses.asdict(r.cell), **r.timing} for r in sweep.results]
    return dump({"type": TIMING_TYPE, "version": VERSION, "machine": sweep.environment.get("machine"), "cells": cells})


def methods_of(sweep: Sweep) -> JsonObject:
    """The methods of a sweep with all their options, as `tokprune.PruneConfig` writes them."""
    names = dict.fromkeys(c.method for c in [*(r.cell for r in sweep.results), *(f.cell for f in sweep.failures)])
    built = {name: build_methods(name, sweep.settings) for name in names}
    return {name: [method_to_dict(m) for m in methods] for name, methods in built.items()}


def _comparison(row: Row) -> JsonObject:
    assert row.paired is not None
    cell = {"task": row.task, "method": row.method, "ratio": row.ratio}
    more = {"difference": row.paired.difference, "p_holm": row.p_holm}
    return {**cell, "against": BASELINE, "metric": row.metric, **dataclasses.asdict(row.paired), **more}


def load(path: str | Path) -> Sweep:
    """Read a results.json, or the one in a folder."""
    file = Path(path)
    file = file / "results.json" if file.is_dir() else file
    data = checked(read_json(file, "results"), TYPE, VERSION, f"results of tokprune eval ({file})")
    timing = _times(file.with_name("timing.json"))
    results = [CellResult.from_dict(c, c["samples"], timing.get(Cell.of(c))) for c in data["cells"]]
    failures = [Failure(Cell.of(f), f["error"], f["reason"]) for f in data["failed"]]
    return Sweep(SweepSettings(**data["settings"]), dict(data["environment"]), results, failures)


def _times(path: Path) -> Mapping[Cell, dict[str, float]]:
    """The times beside a results.json, when they were kept."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return {Cell.of(c): {k: v for k, v in c.items() if k not in ("task", "method", "ratio")} for c in cells}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
