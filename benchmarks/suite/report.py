"""docs/performance.md's tables, made of benchmarks/results/bench_*.json: target, measured, verdict, what bounds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.suite import gpu
from benchmarks.suite.rows import RESULTS, Row, load

TITLES = {
    "counts": "Waits and operations, counted on a stand-in device",
    "selection": "Choosing, against the published formulations",
    "signals": "Signals of the tower",
    "prefill_llava": "Prefill and decoding, against embeddings by hand",
    "prefill_qwen": "The same with M-RoPE",
    "encoder": "Encoder stage",
    "video": "Video",
    "start": "Starting",
    "gpu": "On a GPU",
}
"""Sections in the order of the page."""
NOTES = {
    "counts": "The limit names the family with the most. Signals (hired, visionzip) are finished when the prompt's one "
    "transfer tells the sizes of the pictures. generate() is checked once, in its first step.",
}
"""What a section's rows are bound by, where one sentence serves them all."""


PAGE = RESULTS.parents[1] / "docs" / "performance.md"


def page() -> str:
    """docs/performance.md with its tables made anew."""
    from tools.pages import replace_block

    return replace_block(PAGE.read_text(encoding="utf-8"), "bench", blocks())


def blocks(folder: Path = RESULTS) -> str:
    """The tables of all sections that were measured, and what a GPU has still to tell."""
    out = []
    for section, title in TITLES.items():
        path = folder / f"bench_{section}.json"
        out += [f"### {title}", ""]
        if path.exists():
            data = load(path)
            out += [_made(data), "", *([NOTES[section], ""] if section in NOTES else []), *table(data["rows"]), ""]
        elif section == "gpu":
            out += [
                "Not measured: needs a GPU, run `make bench-gpu`.",
                "",
                "| what, and its target | measured |",
                "|---|---|",
            ]
            out += [f"| {what} | not measured |" for what in gpu.wanted()] + [""]
        else:
            out += [f"Not measured: run `python -m benchmarks.suite {section}`.", ""]
    return "\n".join(out).rstrip()


def _made(data: Mapping[str, Any]) -> str:
    made, commit = data["environment"], str(data["commit"])[:12]
    place = f"{made['machine']}, {made['cpus']} cores, {made['threads']} thread(s), torch {made['torch']}"
    place += f", load {made['load'][0]:g}" if "load" in made else ""
    return f"`{data['command']}` at {commit}; {place}."


def table(rows: list[Row]) -> list[str]:
    """A line a row; a row that misses its target without saying what bounds it is refused."""
    lines = ["| what | target | measured | verdict |", "|---|---:|---:|---|"]
    for row in rows:
        if row.met is False and not row.limit:
            raise SystemExit(f"{row.what!r} misses its target and does not say what bounds it (Row.limit).")
        verdict = row.verdict
        if (
            "over_limit" not in row.beside
            and row.target is not None
            and abs(row.measured.median - row.target) < row.measured.spread
        ):
            verdict = "open: the target lies within the spread of the runs"
        measured = (
            str(row.measured) if len(row.measured.samples) > 1 else f"{row.measured.median:g} {row.measured.unit}"
        )
        lines.append(f"| {row.what} | {row.aim} | {measured.strip()}{_beside(row)} | {verdict} |")
    return lines


def _beside(row: Row) -> str:
    """What a ratio was made of, in brackets."""
    shown = [
        f"{k.removesuffix('_ms').replace('_', ' ')} {v:{'.0f' if v >= 100 else '.3g'}} ms"
        for k, v in row.beside.items()
        if k.endswith("_ms")
    ]
    return f" ({', '.join(shown)})" if shown else ""
