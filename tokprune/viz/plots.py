"""Plots of results: accuracy over ratio, and accuracy against cost with the Pareto front.

They draw from plain records, such as the JSON that sweeps and profiles write, so that every picture can be made again.
Needs matplotlib (the `plot` extra); no display and no global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.errors import OptionError, missing_extra
from tokprune.files import read_json, writing
from tokprune.types import JsonObject
from tokprune.viz import style
from tokprune.viz.style import Colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*<>pHd8h"
BASELINES = {"random": "x", "uniform": "+", "pool": "1"}


@dataclass(frozen=True)
class Point:
    """A method at a ratio with its score, that score's interval, and a cost (ms, FLOPs)."""

    method: str
    ratio: float
    score: float
    low: float | None = None
    high: float | None = None
    cost: float | None = None

    @staticmethod
    def read(records: str | Path | Sequence[JsonObject], cost: str = "cost") -> list[Point]:
        """Points from records, or from a JSON file of them (a list, or an object with "results" or "cells").

        Each needs method, ratio and score (or accuracy); low, high and the number named `cost` are optional.
        """
        if isinstance(records, str | Path):
            data = read_json(records, "results")
            nested = data.get("results", data.get("cells")) if isinstance(data, dict) else data
            records = nested if isinstance(nested, list) else []
        out = []
        for record in records:
            score = record.get("score", record.get("accuracy"))
            if score is None or "method" not in record or record.get("ratio") is None:
                raise OptionError(
                    f'a result needs "method", "ratio" and "score" (or "accuracy"); this one has {sorted(record)}.'
                )
            low, high, price = (record.get(name) for name in ("low", "high", cost))
            out.append(Point(str(record["method"]), float(record["ratio"]), float(score), low, high, price))
        return out


def require() -> None:
    """Raise the error that says how to install matplotlib where it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "drawing plots") from error


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches in the look of all plots."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=hex_of(style.PAPER), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(hex_of(style.PAPER))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(hex_of(style.MUTED))
    axes.tick_params(colors=hex_of(style.MUTED), labelsize=10)
    axes.grid(axis="y", color=hex_of(style.RULE), linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def hex_of(colour: Colour) -> str:
    """ "#1f2937"."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and axis names."""
    if title:
        axes.set_title(title, loc="left", fontsize=13, color=hex_of(style.INK), pad=12)
    axes.set_xlabel(x, fontsize=11, color=hex_of(style.INK))
    axes.set_ylabel(y, fontsize=11, color=hex_of(style.INK))


def looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker per method, no two alike; baselines are grey, so that they read as the floor."""
    others = [m for m in methods if m not in BASELINES]
    colours = [hex_of(colour) for colour in style.series(len(others))]
    out = {m: (colours[i], MARKERS[i % len(MARKERS)]) for i, m in enumerate(others)}
    out |= {m: (hex_of(style.MUTED), BASELINES[m]) for m in methods if m in BASELINES}
    return {m: out[m] for m in methods}


def add_legend(axes: Axes) -> None:
    """The names beside the plot, in as many columns as its height asks for."""
    names = len(axes.get_legend_handles_labels()[1])
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=-(-names // 16))


def _ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    ticks = sorted(set(ratios))
    axes.set_xticks(ticks, [f"{100 * r:.3g} %" for r in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.invert_xaxis()


def accuracy_over_ratio(
    points: Sequence[Point], full: float | None = None, *, title: str = "", score: str = "accuracy"
) -> Figure:
    """One line per method over the share of tokens kept; intervals as bars, the unpruned model dashed."""
    if not points:
        raise OptionError("no results to plot.")
    figure, axes = new_axes(7.5, 4.6)
    methods = list(dict.fromkeys(p.method for p in points))
    for method, (colour, marker) in looks(methods).items():
        mine = sorted((p for p in points if p.method == method), key=lambda p: -p.ratio)
        x, y = [p.ratio for p in mine], [p.score for p in mine]
        axes.plot(x, y, marker=marker, color=colour, linewidth=1.8, markersize=6, label=method)
        for p in mine:
            if p.low is not None and p.high is not None:
                axes.vlines(p.ratio, p.low, p.high, color=colour, linewidth=1.0, alpha=0.6)
    if full is not None:
        axes.axhline(full, color=hex_of(style.INK), linewidth=1.0, linestyle=(0, (5, 4)))
        axes.annotate("all tokens", (0.01, full), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    _ratio_axis(axes, [p.ratio for p in points])
    name_axes(axes, title, "visual tokens kept", score)
    add_legend(axes)
    return figure


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both cost and score, by rising cost."""
    out: list[Point] = []
    priced = [p for p in points if p.cost is not None]
    for p in sorted(priced, key=lambda p: (p.cost, -p.score)):
        if not out or p.score > out[-1].score:
            out.append(p)
    return out


def pareto(
    points: Sequence[Point],
    full: Point | None = None,
    *,
    cost: str = "latency (ms)",
    title: str = "",
    score: str = "accuracy",
) -> Figure:
    """Score against cost, with the Pareto front; its points carry their ratio where there is room."""
    priced = [p for p in points if p.cost is not None]
    if not priced:
        raise OptionError(
            "no result has a cost to plot against; add a number per result and name it: Point.read(..., cost=...)."
        )
    figure, axes = new_axes(7.5, 4.8)
    for method, (colour, marker) in looks(list(dict.fromkeys(p.method for p in priced))).items():
        mine = [p for p in priced if p.method == method]
        x, y = [float(p.cost or 0.0) for p in mine], [p.score for p in mine]
        axes.scatter(x, y, s=46, color=colour, marker=marker, label=method, zorder=3)
    everything = priced + ([full] if full is not None and full.cost is not None else [])
    best = [(float(p.cost or 0.0), p) for p in front(everything)]
    steps, scores = [at for at, _ in best], [p.score for _, p in best]
    axes.step(steps, scores, where="post", color=hex_of(style.MUTED), linewidth=1.2, zorder=2)
    wide = max(float(p.cost or 0.0) for p in everything)
    tall = max(p.score for p in everything) - min(p.score for p in everything) or 1.0
    named: list[tuple[float, float]] = []
    for at, p in reversed(best):  # the space above and left of the front is free
        if p is not full and all(abs(at - a) > 0.09 * wide or abs(p.score - b) > 0.045 * tall for a, b in named):
            label = f"{100 * p.ratio:.3g} %"
            axes.annotate(label, (at, p.score), xytext=(-8, 4), textcoords="offset points", ha="right", fontsize=9)
            named.append((at, p.score))
    if full is not None and full.cost is not None:
        axes.scatter(
            [full.cost], [full.score], s=120, marker="*", color=hex_of(style.INK), label="all tokens", zorder=3
        )
    axes.set_xlim(left=0)
    name_axes(axes, title, cost, score)
    add_legend(axes)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, SVG or PDF by the name's ending; equal figures give equal files."""
    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf"):
        raise OptionError(f"cannot write {target.name!r}: end the name in .png, .svg or .pdf.")
    metadata: JsonObject = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with writing(target):
        figure.savefig(target, format=kind, metadata=metadata)
    return target


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file; equal figures give equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
