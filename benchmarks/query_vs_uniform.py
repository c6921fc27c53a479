"""Does it pay to choose frames by the question? On clips with the answer in few frames, at equal numbers of tokens.

    python benchmarks/query_vs_uniform.py --out benchmarks/results/query_vs_uniform.json

Generated 32 s clips of 16 to 32 scenes, each question about one of them, 32 frames of 64 tokens: 2,048 visual tokens.
Every method gets the same budget of tokens per video. Uniform sampling comes in two kinds, few whole frames and a few
tokens of every frame; methods are compared with the better of the two at that budget, question by question (paired
bootstrap, exact McNemar test, Holm's correction). The scorer is the demo's own CLIP, trained on the same kind of
drawings: a good one, as scorers go.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clip_cells import Cell, Clips, Setting, paired

import tokprune
import tokprune.demo
from tokprune.environment import machine
from tokprune.errors import TokpruneError
from tokprune.methods.base import Method

UNIFORM = ("uniform, whole frames", "uniform, all frames")


def settings(budgets: list[int], own: bool) -> list[list[Setting]]:
    """Per budget, all methods. own: also ask the answering model itself about every frame."""
    get = tokprune.get_method
    methods: dict[str, Method] = {
        UNIFORM[0]: get("uniform_frames"),
        UNIFORM[1]: get("uniform_frames", spread="tokens"),
        "quota, embeddings": get("quota", score="embeddings"),
        "quota, clip": get("quota", score="clip"),
        **({"quota, self": get("quota", score="self")} if own else {}),
        "aks, clip": get("aks", score="clip"),
        "wfs_sb, clip": get("wfs_sb", score="clip"),
    }
    return [[Setting(name, (method,), budget=b) for name, method in methods.items()] for b in budgets]


def verdict(row: dict[str, Any]) -> str:
    """One word for a comparison."""
    if row["p_holm"] < 0.05:
        return "better" if row["difference"] > 0 else "worse"
    return "no difference shown"


def measure(clips: Clips, budgets: list[int], own: bool) -> tuple[list[Cell], list[dict[str, Any]]]:
    """All cells, and the comparisons with the better uniform sampling of each budget."""
    full = clips.ask(Setting("all tokens", ()))
    print(f"all {full.total:.0f} tokens: {full.accuracy:.3f}", flush=True)
    cells, comparisons = [full], []
    for row in settings(budgets, own):
        got: list[Cell] = []
        for setting in row:
            started = time.perf_counter()
            try:
                cell = clips.ask(setting)
            except TokpruneError as error:
                cells.append(Cell(setting.label, 0.0, setting.budget, error=str(error)))
                print(f"{setting.budget:5d}  {setting.label:22s} cannot run: {error}", flush=True)
                continue
            if cell.kept != setting.budget:
                raise SystemExit(f"{setting.label} kept {cell.kept} tokens instead of {setting.budget}.")
            got.append(cell)
            seconds = time.perf_counter() - started
            print(f"{setting.budget:5d}  {setting.label:22s} {cell.accuracy:.3f}  {seconds:.0f} s", flush=True)
        base = max((c for c in got if c.method in UNIFORM), key=lambda c: c.accuracy)
        for found in paired(base, [c for c in got if c.method not in UNIFORM]):
            found["verdict"] = verdict(found)
            comparisons.append(found)
            print(
                f"       {found['method']:22s} {found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] "
                f"against {found['against']!r}: {found['verdict']} (p {found['p_holm']:.2g})"
            )
        cells += got
    return cells, comparisons


def main(arguments: list[str] | None = None) -> None:
    """Run everything and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--budgets", default="512,256,128,64", help="tokens per video, of 2,048")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--self", dest="own", action="store_true", help="ask the answering model about every frame, too"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/query_vs_uniform.json"))
    args = parser.parse_args(arguments)
    budgets = [int(b) for b in args.budgets.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        examples = tokprune.demo.held_out_clips(args.questions, args.seed, folder, long=True)
        clips = Clips(examples)
        cells, comparisons = measure(clips, budgets, args.own)
    data = {
        "type": "tokprune.query_vs_uniform",
        "version": 1,
        "command": " ".join(["python", *sys.argv]),
        "environment": machine(),
        "model": "demo clips",
        "seed": args.seed,
        "questions": len(examples),
        "cells": [c.to_dict() for c in cells],
        "comparisons": comparisons,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
