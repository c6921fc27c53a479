"""Plots of a demo sweep: accuracy over ratio, and against prefill time and FLOPs."""

from __future__ import annotations

from pathlib import Path

from tokprune.viz.plots import Point, accuracy_over_ratio, pareto, save

COSTS = {"prefill_ms": "prefill per question (ms)", "flops": "FLOPs per answer"}


def save_plots(results: Path, folder: Path) -> list[Path]:
    """The plots of a JSON file of `tokprune demo --json`, as PNG files."""
    everything = Point.read(results)
    base = next((p for p in everything if p.method == "none"), None)
    points = [p for p in everything if p.method != "none" and p.ratio < 1]
    out = [save(accuracy_over_ratio(points, base.score if base else None), folder / "accuracy.png")]
    for cost, name in COSTS.items():
        priced = Point.read(results, cost)
        if any(p.cost is not None for p in priced):
            full = next((p for p in priced if p.method == "none"), None)
            shown = [p for p in priced if p.method != "none" and p.ratio < 1]
            out.append(save(pareto(shown, full, cost=name), folder / f"pareto_{cost.removesuffix('_ms')}.png"))
    return out
