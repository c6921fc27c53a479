"""What halving the symmetric matrix gives DivPrune on one CPU thread, beside the whole product and the bound.

    python benchmarks/selection.py --json benchmarks/results/selection.json

Paired rounds in changing order, CPU time, medians. whole: DivPrune with one full matrix product. bound: half the time
of that product alone, which no method that compares all pairs in float32 can beat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.methods import commit, environment
from benchmarks.naive.pairs import scene
from tokprune.methods.connector.divprune import divprune
from tokprune.ops import similarity

CASES = {"one picture, 288 of 2880": (1, 2880, 288), "five equal tiles, 58 of 576": (5, 576, 58)}
WIDTH = 4096


def halves(pictures: int, n: int, keep: int, rounds: int = 7) -> dict[str, Any]:
    """CPU milliseconds of both forms of DivPrune and of the bare product, round by round."""
    seed = torch.Generator().manual_seed(0)
    features = torch.stack([scene(n, WIDTH, seed) for _ in range(pictures)])

    def whole() -> torch.Tensor:
        with patch.object(similarity, "gram", lambda rows: rows @ rows.mT):
            return divprune(features, keep)

    forms: dict[str, Callable[[], Any]] = {
        "whole": whole,
        "halves": lambda: divprune(features, keep),
        "product": lambda: features @ features.mT,
    }
    same = torch.equal(forms["whole"](), forms["halves"]())
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds):
        for name in list(forms) if turn % 2 == 0 else list(forms)[::-1]:
            start = time.process_time()
            forms[name]()
            times[name].append(1e3 * (time.process_time() - start))
    speed = [a / b for a, b in zip(times["whole"], times["halves"], strict=True)]
    over = [b / (a / 2) for a, b in zip(times["product"], times["halves"], strict=True)]
    return {
        **{f"{name}_ms": [round(x, 1) for x in found] for name, found in times.items()},
        "same_choice": same,
        "speed_over_whole": round(statistics.median(speed), 3),
        "time_over_bound": round(statistics.median(over), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = {
        "type": "tokprune.benchmark.selection",
        "version": 1,
        "command": " ".join(["python", "benchmarks/selection.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit(),
        "environment": environment(),
        "cases": {name: halves(*case, args.rounds) for name, case in CASES.items()},
    }
    for name, found in data["cases"].items():
        print(f"{name}: {found['speed_over_whole']} x the whole product, {found['time_over_bound']} x the bound")
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
