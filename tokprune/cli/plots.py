"""`tokprune plots`: pictures of results from the JSON that profile, demo and eval write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli import options
from tokprune.cli.output import console_for, say_saved
from tokprune.errors import OptionError
from tokprune.files import read_json


def plots(
    results: Annotated[Path, typer.Argument(help="The JSON that profile, demo or eval wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pictures.")] = Path("plots"),
    quiet: options.Quiet = False,
) -> None:
    """Draw the plots of a results file: latency bars, accuracy over ratio, accuracy against cost."""
    data = read_json(results, "results")
    kind = data.get("type") if isinstance(data, dict) else None
    if kind not in DRAWN:
        known = ", ".join(f'"{name}"' for name in DRAWN)
        raise OptionError(
            f'{results} holds no results that can be drawn: its "type" is {kind!r}, known are {known}. Write one with '
            "tokprune profile --json, tokprune demo --json or tokprune eval."
        )
    say_saved(console_for(quiet), DRAWN[kind](results, out))


def _profile(results: Path, folder: Path) -> list[Path]:
    from tokprune.profiling.plots import save_plots
    from tokprune.profiling.report import ProfileReport

    return save_plots(ProfileReport.load(results), folder)


def _demo(results: Path, folder: Path) -> list[Path]:
    from tokprune.viz.plots import Point, accuracy_over_ratio, pareto, save

    everything = Point.read(results)
    base = next((p for p in everything if p.method == "none"), None)
    points = [p for p in everything if p.method != "none" and p.ratio < 1]
    out = [save(accuracy_over_ratio(points, base.score if base else None), folder / "accuracy.png")]
    for cost, name in {"prefill_ms": "prefill per question (ms)", "flops": "FLOPs per answer"}.items():
        priced = Point.read(results, cost)
        if any(p.cost is not None for p in priced):
            full = next((p for p in priced if p.method == "none"), None)
            shown = [p for p in priced if p.method != "none" and p.ratio < 1]
            out.append(save(pareto(shown, full, cost=name), folder / f"pareto_{cost.removesuffix('_ms')}.png"))
    return out


def _eval(results: Path, folder: Path) -> list[Path]:
    from tokprune.evaluation.report import figures, save_plots
    from tokprune.evaluation.results import load
    from tokprune.evaluation.table import rows_of

    drawn = figures(rows_of(load(results)))
    if not drawn:
        raise OptionError(f"{results} holds no pruned cell to draw.")
    return save_plots(drawn, folder)


DRAWN: dict[str, Callable[[Path, Path], list[Path]]] = {
    "tokprune.ProfileReport": _profile,
    "tokprune.demo": _demo,
    "tokprune.eval": _eval,
}
