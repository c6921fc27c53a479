"""Questions about clips over video methods and keep ratios: accuracy, cost, plots. Offline, on the demo VLM for clips.

    python benchmarks/video_qa.py                                   # all methods, the package's own questions
    python benchmarks/video_qa.py --methods evs,vidcom2 --ratios 0.25,0.1 --limit 30

Writes benchmarks/results/video_qa.json, video_qa_accuracy.png and video_qa_pareto.png. Every setting answers the same
questions, so that methods are compared question by question with random pruning at the same ratio. The published video
benchmarks (Video-MME, MLVU and others) on a real model are one-liners of lmms-eval: docs/lmms_eval.md; how to read the
numbers: docs/video_benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clip_cells import Cell, Clips, Setting, balanced, packaged_clips, paired

import tokprune
import tokprune.demo
from tokprune.environment import machine
from tokprune.errors import TokpruneError, unknown
from tokprune.methods.base import Method
from tokprune.registry import list_methods, method_class

BASELINES = ("random", "uniform")
PER_FRAME = ("divprune", "visionzip", "fastervlm")  # image methods, here in every frame by itself
BY_QUESTION = ("quota", "aks", "wfs_sb")  # frames methods that need a scorer


def catalogue() -> dict[str, tuple[str | Method, ...]]:
    """Every method by the name that tables give it: the baselines, the frames stage, the video methods, image methods
    per frame."""
    get = tokprune.get_method
    frames = {
        name: (get(name, score="clip") if name in BY_QUESTION else get(name),)
        for name in list_methods("frames")
        if name != "fps_frames"  # at these clips' one frame a second it is uniform_frames
    }
    video = {n: (get(n),) for n in list_methods("connector") if method_class(n).info.video}
    each = {f"{n} per frame": (get("uniform_frames", spread="tokens"), get(n)) for n in PER_FRAME}
    return {**{n: (get(n),) for n in BASELINES}, **frames, **video, **each}


def measure(clips: Clips, names: list[str], ratios: list[float]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """All cells, and how each compares with random pruning at its ratio."""
    stages, cells, comparisons = catalogue(), [], []
    cells.append(clips.ask(Setting("none", (), ratio=1.0), cost=True))
    print(f"none              1.00  {cells[0].accuracy:.3f}  {cells[0].gflops:.2f} GFLOPs", flush=True)
    for ratio in sorted(ratios, reverse=True):
        got: list[Cell] = []
        for name in names:
            started = time.perf_counter()
            try:
                cell = clips.ask(Setting(name, stages[name], ratio=ratio), cost=True)
            except TokpruneError as error:
                cells.append(Cell(name, ratio, None, error=str(error)))
                print(f"{name:18s} {ratio:.2f}  cannot run: {error}", flush=True)
                continue
            got.append(cell)
            print(
                f"{name:18s} {ratio:.2f}  {cell.accuracy:.3f} [{cell.low:.3f}, {cell.high:.3f}]  {cell.kept:.1f} "
                f"tokens  {cell.gflops:.2f} GFLOPs  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
        base = next((c for c in got if c.method == "random"), None)
        if base is not None and len(got) > 1:
            comparisons += paired(base, [c for c in got if c is not base])
        cells += got
    return cells, comparisons


def draw(cells: list[Cell], out: Path) -> list[Path]:
    """Accuracy over ratio, and accuracy against FLOPs."""
    from tokprune.viz import plots

    full = next(c for c in cells if c.method == "none")
    points = plots.Point.read([c.to_dict() for c in cells if c is not full and not c.error], cost="gflops")
    title = f"Demo VLM for clips, {full.questions} questions"
    star = plots.Point("none", 1.0, full.accuracy, cost=full.gflops)
    figures = {
        "accuracy": plots.accuracy_over_ratio(points, full.accuracy, title=title),
        "pareto": plots.pareto(points, star, cost="GFLOPs of an answer, vision tower included", title=title),
    }
    return [plots.save(f, out.with_name(f"{out.stem}_{name}.png")) for name, f in figures.items()]


def main(arguments: list[str] | None = None) -> None:
    """Run the cells, write JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=120, help="how many, in turn over the types")
    parser.add_argument("--limit", type=int, default=None, help="ask only the first so many of them")
    parser.add_argument("--methods", default="", help="names as the table has them; default: all")
    parser.add_argument("--ratios", default="0.25,0.1,0.05")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_qa.json"))
    args = parser.parse_args(arguments)
    known = catalogue()
    names = [n.strip() for n in args.methods.split(",")] if args.methods else list(known)
    for name in names:
        if name not in known:
            raise unknown("method of this benchmark", name, known)
    ratios = [float(r) for r in args.ratios.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        packaged = packaged_clips()
        source = "tokprune_clips" if packaged else "held_out_clips"
        examples = packaged or tokprune.demo.held_out_clips(args.questions, 0, folder)
        clips = Clips(balanced(examples, args.questions)[: args.limit])
        cells, comparisons = measure(clips, names, ratios)
    data = {
        "type": "tokprune.video_qa",
        "version": 1,
        "command": " ".join(["python", *sys.argv]),
        "environment": machine(),
        "model": "demo clips",
        "data": source,
        "questions": len(clips.examples),
        "cells": [c.to_dict() for c in cells],
        "comparisons": comparisons,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")
    if not args.no_plots:
        for path in draw(cells, args.out):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
