"""CPU time of choices and pruned prefills in two checkouts of tokprune, in turns: has a change made anything slower?

    git worktree add --detach ../before 22af06d
    python benchmarks/checkouts.py ../before --json benchmarks/results/checkouts.json

Each checkout runs in a process of its own, on one thread; a ratio is this checkout's time over the other's, round by
round. Methods that either does not have, or that want a question, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[1]
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl")
PREFILLED = ("divprune", "hired", "visionzip", "tome")
N, KEEP, WIDTH = 2880, 288, 4096


def cells() -> dict[str, Callable[[], object]]:
    """What the checkout on the path can run: choices of 288 of 2,880 tokens, forwards of tiny models."""
    import tokprune
    from tokprune.errors import TokpruneError
    from tokprune.testing import build, picture
    from tokprune.tokens import Layout, VisualTokens

    found: dict[str, Callable[[], object]] = {}
    seed = torch.Generator().manual_seed(0)
    features = torch.randn(N, WIDTH, generator=seed)
    layout = Layout.grid(24, 24, 5, "tiles", canvas=(2, 2), thumbnail=True)
    for name in tokprune.list_methods(stage="connector", query_aware=False):
        try:
            method = tokprune.get_method(name)
            signals = {need: signal(need, seed) for need in method.needs}
        except (TokpruneError, KeyError):
            continue
        found[f"choice, {name}"] = partial(method.select, VisualTokens(features, layout, signals), KEEP)
    for family in FAMILIES:
        tiny = build(family)
        inputs = tiny.inputs([["a", ("image", picture(56, 56)), "what?"], ["b", ("image", picture(56, 56)), "is it?"]])
        for name in PREFILLED:
            found[f"prefill, {family}, {name}"] = partial(forward, tiny.model, name, inputs)
    return found


def signal(need: str, seed: torch.Generator) -> torch.Tensor:
    """Values of a signal of the tower, by the first word of its name."""
    kind = need.split(":")[0]
    if kind in ("cls_attention", "received_attention"):
        return torch.randn(N, generator=seed).softmax(0)
    return torch.randn(N, {"encoder_features": 1024, "keys": 64}[kind], generator=seed)


def forward(model: Any, name: str, inputs: Mapping[str, Any]) -> None:
    """A pruned prefill; apply() and remove() are part of it, as neither checkout leaves them out."""
    import tokprune

    with tokprune.apply(model, name, ratio=0.25):
        model(**inputs)


def serve() -> None:
    """Tell the names of the cells, then run what each line of the input asks for and tell CPU milliseconds a call."""
    torch.set_num_threads(1)
    with torch.no_grad():
        known = cells()
        print(json.dumps(sorted(known)), flush=True)
        for line in sys.stdin:
            name, calls = json.loads(line)
            try:
                start = time.process_time()
                for _ in range(calls):
                    known[name]()
                print(json.dumps((time.process_time() - start) * 1e3 / calls), flush=True)
            except Exception as error:  # of whichever kind: the cell is left out, and the reason told
                print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


class Checkout:
    """A process that runs cells of one checkout."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        )
        self.cells: list[str] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, cell: str, calls: int) -> float | str:
        """CPU milliseconds of a call, or what went wrong."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([cell, calls]) + "\n")
        self._process.stdin.flush()
        return self._read()  # type: ignore[no-any-return]


def compare(before: Checkout, after: Checkout, cell: str, rounds: int) -> dict[str, Any]:
    """One cell in both, in changing order."""
    warm = [checkout.run(cell, 1) for checkout in (before, after)]
    if wrong := [x for x in warm if isinstance(x, str)]:
        return {"cell": cell, "left_out": wrong[0]}
    calls = max(1, round(20 / max(*warm, 1e-3)))  # type: ignore[type-var]
    pairs = []
    for i in range(rounds):
        order = (before, after) if i % 2 == 0 else (after, before)
        times = {id(checkout): checkout.run(cell, calls) for checkout in order}
        pairs.append((times[id(before)], times[id(after)]))
    low, middle, high = quantiles([float(b) / float(a) for a, b in pairs], n=4, method="inclusive")
    old, new = (median(float(x) for x in column) for column in zip(*pairs, strict=True))
    return {"cell": cell, "before_ms": old, "after_ms": new, "ratio": middle, "q1": low, "q3": high, "rounds": rounds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve()
        return
    if args.before is None:
        parser.error("which checkout is to be compared with this one?")
    sys.path.insert(0, str(HERE))
    from benchmarks.encoder_record import commit
    from tokprune.environment import environment

    before, after = Checkout(args.before.resolve()), Checkout(HERE)
    rows = []
    for cell in after.cells:
        if cell in before.cells:
            rows.append(compare(before, after, cell, args.rounds))
            print(rows[-1], flush=True)
    if args.json:
        git = ["git", "-C", str(args.before), "rev-parse", "HEAD"]
        data = {
            "command": f"python benchmarks/checkouts.py BEFORE --rounds {args.rounds}",
            "before": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
            "commit": commit(),
            "environment": environment("cpu"),
            "rows": rows,
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
