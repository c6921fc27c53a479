"""`tokprune plots`: pictures of results from the JSON that profile, demo and eval write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tokprune.errors import OptionError


def run_plots(results: Path, out: Path, quiet: bool = False) -> None:
    """Draw what a results file holds into a folder."""
    try:
        data = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the results {results}: {error}") from error
    kind = data.get("type") if isinstance(data, dict) else None
    if kind not in DRAWN:
        known = ", ".join(f'"{name}"' for name in DRAWN)
        raise OptionError(
            f'{results} holds no results that can be drawn: its "type" is {kind!r}, known are {known}. Write one with '
            "tokprune profile --json, tokprune demo --json or tokprune eval."
        )
    try:
        paths = DRAWN[kind](results, out)
    except OSError as error:
        raise OptionError(f"cannot write pictures to {out}: {error}") from error
    console = Console(quiet=quiet)
    for path in paths:
        console.print(f"saved {path}", soft_wrap=True)


def draw_profile(report: Any, folder: Path) -> list[Path]:
    """Latency bars of a profile, to the last and to the first token."""
    from tokprune.viz.plots import latency_bars, save

    folder.mkdir(parents=True, exist_ok=True)
    return [
        save(latency_bars(report), folder / "latency.png"),
        save(latency_bars(report, decode=False), folder / "ttft.png"),
    ]


def _profile(results: Path, folder: Path) -> list[Path]:
    from tokprune.profiling.report import ProfileReport

    report = ProfileReport.load(results)
    if not report.cells:
        raise OptionError(f"{results} holds no measured run.")
    return draw_profile(report, folder)


def _demo(results: Path, folder: Path) -> list[Path]:
    """Accuracy over ratio, and against prefill time and FLOPs."""
    from tokprune.viz.plots import Point, accuracy_over_ratio, pareto, save

    folder.mkdir(parents=True, exist_ok=True)
    out = []
    everything = Point.read(results)
    base = next((p for p in everything if p.method == "none"), None)
    points = [p for p in everything if p.method != "none" and p.ratio < 1]
    figure = accuracy_over_ratio(points, base.score if base else None)
    out.append(save(figure, folder / "accuracy.png"))
    for cost, name in (("prefill_ms", "prefill per question (ms)"), ("flops", "FLOPs per answer")):
        priced = Point.read(results, cost)
        if all(p.cost is None for p in priced):
            continue
        full = next((p for p in priced if p.method == "none"), None)
        shown = [p for p in priced if p.method != "none" and p.ratio < 1]
        out.append(save(pareto(shown, full, cost=name), folder / f"pareto_{cost.removesuffix('_ms')}.png"))
    return out


def _eval(results: Path, folder: Path) -> list[Path]:
    """A sweep of `tokprune eval`: each task's metric over ratio, and against the costs that were measured."""
    from tokprune.evaluation.results import load
    from tokprune.evaluation.table import rows_of
    from tokprune.viz.plots import Point, accuracy_over_ratio, pareto, save

    folder.mkdir(parents=True, exist_ok=True)
    out = []
    rows = [row for row in rows_of(load(results)) if math.isfinite(row.score)]
    for task, metric in dict.fromkeys((row.task, row.metric) for row in rows):
        mine = [row for row in rows if (row.task, row.metric) == (task, metric)]
        score = f"{metric} (%)" if mine[0].percent else metric
        base = next((row for row in mine if row.method == "none"), None)
        pruned = [row for row in mine if row.method != "none" and row.ratio < 1]
        if not pruned:
            continue
        name = f"{task}_{metric}".replace("/", "_")
        points = [Point(row.method, row.ratio, row.score) for row in pruned]
        figure = accuracy_over_ratio(points, base.score if base else None, title=task, score=score)
        out.append(save(figure, folder / f"{name}.png"))
        for cost, label in (("ttft_ms", "time to first token (ms)"), ("flops", "FLOPs per answer")):
            priced = [Point(r.method, r.ratio, r.score, cost=getattr(r, cost)) for r in pruned if getattr(r, cost)]
            if priced:
                full = Point("none", 1.0, base.score, cost=getattr(base, cost)) if base else None
                figure = pareto(priced, full, cost=label, title=task, score=score)
                out.append(save(figure, folder / f"{name}_{cost.removesuffix('_ms')}.png"))
    if not out:
        raise OptionError(f"{results} holds no pruned cell to draw.")
    return out


DRAWN: dict[str, Callable[[Path, Path], list[Path]]] = {
    "tokprune.ProfileReport": _profile,
    "tokprune.demo": _demo,
    "tokprune.eval": _eval,
}
