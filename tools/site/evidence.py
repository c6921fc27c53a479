"""What benchmarks/results/ says of one method, as curves and rows that name their file, command and commit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Points = list[tuple[float, float]]
"""(share, accuracy), both 0 … 1, ascending."""


@dataclass(frozen=True)
class Curve:
    """Accuracy over a share, beside its baselines.

    lines: by name, the method first. full: accuracy of the unpruned model. over: what the share is of. source: how it
    was measured, as Markdown.
    """

    lines: dict[str, Points]
    full: float
    over: str
    source: str


@cache
def read(name: str) -> dict[str, Any]:
    """A results file."""
    data: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return data


def curve_of(method: str) -> Curve | None:
    """The curve of a method, or None where nothing was measured."""
    for file, what in (("zoo.json", "drawn pictures"), ("video_qa.json", "drawn clips")):
        data = read(file)
        cells = data["cells"]
        if method not in {c["method"] for c in cells} or method == "none":
            continue
        base = next(c for c in cells if c["method"] == "none")
        names = dict.fromkeys([method, "random", "uniform" if file == "zoo.json" else "uniform_frames"])
        lines = {n: sorted((c["ratio"], c["accuracy"]) for c in cells if c["method"] == n) for n in names}
        commits = sorted({c["commit"][:7] for c in cells if c["method"] == method and "commit" in c})
        at = f", commit {', '.join(commits)}" if commits else ""
        source = (
            f"{data['questions']} held-out questions about {what} per point, demo VLM, "
            f"{base['total']:.0f} visual tokens; `{data['command']}`{at}, {data['environment']['machine']} "
            f"([{file}](../../benchmarks/results/{file}))."
        )
        return Curve(lines, base["accuracy"], "visual tokens kept", source)
    return _tower_curve(method) or _llm_curve(method)


def _tower_curve(method: str) -> Curve | None:
    data = read("encoder_demo.json")
    rows = [r for r in data["rows"] if r["method"].replace(" router", "").split(",")[0] == method]
    if not rows or method == "none":
        return None
    variants = dict.fromkeys(r["method"] for r in rows)
    base = next(r for r in data["rows"] if r["method"] == "none")
    lines = {v: sorted((r["flops"], r["places"]) for r in rows if r["method"] == v) for v in variants}
    source = (
        f"{data['questions']} held-out questions per point, demo VLM whose tower alone is reduced; "
        f"`{data['command']}`, commit {data['commit']}, {data['environment']['machine']} "
        "([encoder_demo.json](../../benchmarks/results/encoder_demo.json), read with care in "
        "[encoder](../encoder.md))."
    )
    return Curve(lines, base["places"], "the tower's arithmetic left", source)


def _llm_curve(method: str) -> Curve | None:
    """Of a method inside the LLM or of its cache, with the variants that were measured."""
    for file, x, over in (
        ("decoder_demo.json", "flops", "FLOPs of the LLM's prefill"),
        ("cache_demo.json", "share", "visual keys that a step reads"),
    ):
        data = read(file)
        base, *rows = data["rows"]
        variants = dict.fromkeys(r["method"] for r in rows if method in re.split(r" \+ |, ", r["method"]))
        if not variants:
            continue
        lines = {v: sorted((r[x], r["accuracy"]) for r in rows if r["method"] == v) for v in [*variants, "random"]}
        source = (
            f"{data['questions']} held-out questions per point, demo VLM; `{data['command']}`, commit "
            f"{data['commit']}, {data['environment']['machine']} ([{file}](../../benchmarks/results/{file}), read with "
            "care in [decoder](../decoder.md)). random: in front of the LLM."
        )
        return Curve(lines, base["accuracy"], over, source)
    return None


def cost_rows(method: str) -> list[str]:
    """CPU times of the method's arithmetic beside the published formulation's, as lines of a table."""
    data = read("methods.json")
    rows = [r for r in data["rows"] if r["method"].split(" ")[0] == method]
    if not rows:
        return []
    lines = ["| what | tokens | ours | published formulation |", "|---|---|---:|---:|"]
    for r in rows:
        published = r["published"]["cpu_ms"] if r["published"] else None
        other = "" if published is None else f"{published:.2f} ms"
        lines.append(f"| `{r['method']}` | {r['case']} | {r['ours']['cpu_ms']:.2f} ms | {other} |")
    note = (
        f"CPU time of choosing, one thread; `{data['command']}`, commit {data['commit'][:7]}, "
        f"{data['environment']['machine']} ([methods.json](../../benchmarks/results/methods.json)). On a GPU it is "
        "other: nothing was measured there."
    )
    return [*lines, "", note]
