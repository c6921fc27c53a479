"""Plots of a profile: where the time of each run goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.errors import OptionError
from tokprune.files import writing
from tokprune.profiling.report import ProfileReport
from tokprune.viz import style
from tokprune.viz.plots import hex_of, name_axes, new_axes, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_STAGES = ("vision", "projector", "select", "prefill", "decode", "other")


def save_plots(report: ProfileReport, folder: Path) -> list[Path]:
    """Latency bars to the last and to the first token, as PNG files."""
    if not report.cells:
        raise OptionError("this profile holds no measured run.")
    with writing(folder, folder=True):
        return [
            save(latency_bars(report), folder / "latency.png"),
            save(latency_bars(report, decode=False), folder / "ttft.png"),
        ]


def median_run(samples: Sequence[float]) -> int:
    """Which sample is the middle one; of an even number, the lower of the two."""
    return sorted(range(len(samples)), key=lambda i: samples[i])[(len(samples) - 1) // 2]


def latency_bars(report: ProfileReport, *, title: str = "", decode: bool = True) -> Figure:
    """Where the time of each run goes, by stage. decode: include decoding, so that a bar is the whole answer.

    A bar is the run of median length, stage by stage, so that its parts add up to the number beside it; medians of the
    stages would come from different runs and add up to another number.
    """
    cells, whole = report.cells, "total" if decode else "ttft"
    middle = [median_run(c.times[whole].samples) for c in cells]
    figure, axes = new_axes(8.5, 1.4 + 0.46 * len(cells))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=hex_of(style.RULE), linewidth=0.8)
    stages = [s for s in SHOWN_STAGES if decode or s != "decode"]
    left = [0.0] * len(cells)
    names = [c.name for c in cells]
    for stage in stages:
        widths = [c.times[stage].samples[at] for c, at in zip(cells, middle, strict=True)]
        axes.barh(
            names,
            widths,
            left=left,
            height=0.66,
            color=hex_of(style.STAGES[stage]),
            label=stage,
            edgecolor=hex_of(style.PAPER),
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, (cell, end) in enumerate(zip(cells, left, strict=True)):
        gain = None if cell.kind == "plain" else report.speedup(cell, whole)
        faster = "" if gain is None else f"   {gain:.2f} x"
        axes.annotate(
            f"{cell.times[whole].samples[middle[i]]:.0f} ms{faster}",
            (end, i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(left, default=1.0))
    axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=hex_of(style.INK))
    axes.spines["left"].set_visible(False)
    what = f"ms, the median of {report.environment.get('repeats', '?')} runs" + (
        f", {report.new_tokens} new tokens" if decode else ""
    )
    name_axes(axes, title or report.title, what, "")
    axes.legend(
        frameon=False, fontsize=10, ncols=len(stages), loc="upper left", bbox_to_anchor=(0, -0.16 - 0.5 / len(cells))
    )
    return figure
