"""Every connector method at several keep ratios on the demo VLM: the table of docs/zoo.md.

    python benchmarks/zoo.py --questions 525 --out benchmarks/results/zoo.json

Cells already in the output file are not run again, but for those of --methods. Each cell names the commit that it was
measured at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.demo.scenes import held_out
from tokprune.demo.sweep import plan_cells, run_cell
from tokprune.environment import commit, machine
from tokprune.registry import list_methods, method_class


def main() -> None:
    """Run the missing cells and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=525)
    parser.add_argument("--ratios", default="0.25,0.1,0.05")
    parser.add_argument(
        "--methods", default="", help="measure these again, separated by commas; default: what is missing"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/zoo.json"))
    args = parser.parse_args()
    ratios = [float(r) for r in args.ratios.split(",")]
    infos = {name: method_class(name).info for name in list_methods("connector")}
    names = [name for name, info in infos.items() if not info.wrapper and not info.video]
    again = set(filter(None, args.methods.split(",")))
    if unknown := again - set(names):
        parser.error(f"no method for pictures is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    first = [n for n in ("none", "random", "uniform") if n in names]
    names = first + [n for n in names if n not in first]
    model, processor = tokprune.demo.load()
    scorer = tokprune.demo.load_scorer()
    examples = held_out(args.questions)
    data = {
        "type": "tokprune.zoo",
        "version": 1,
        "model": "demo",
        "questions": len(examples),
        "command": f"python benchmarks/zoo.py --questions {args.questions}",
        "environment": machine(),
        "cells": [],
    }
    if args.out.exists():
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if old["questions"] == data["questions"]:
            data["cells"] = [c for c in old["cells"] if c["method"] in names]
    done = {(c["method"], c["ratio"]) for c in data["cells"] if c["method"] not in again}
    plan = plan_cells(names, ratios)
    for method, ratio in plan:
        if (method, ratio) in done:
            continue
        cell = run_cell(Asker(model, processor, scorer=scorer), examples, method, ratio)
        data["cells"] = [c for c in data["cells"] if (c["method"], c["ratio"]) != (method, ratio)]
        data["cells"].append(cell.to_dict() | {"commit": commit()})
        order = {key: i for i, key in enumerate(plan)}
        data["cells"].sort(key=lambda c: order.get((c["method"], c["ratio"]), len(order)))
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"{method:16s} {ratio:5.2f}  {cell.accuracy:.3f}  {cell.seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
