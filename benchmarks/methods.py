"""CPU time of every connector method beside its published formulation, on the same input.

    python benchmarks/methods.py --json benchmarks/results/methods.json     LLaVA-1.5 and LLaVA-NeXT sizes, minutes
    python benchmarks/methods.py --quick                                    one small size, seconds: what CI runs
    python benchmarks/methods.py --methods divprune,scope                   some of them

Both run on one thread, warmed up, in turns (A B, B A, ...), so that whatever else the machine does hits both alike. The
exit code is 1 when a method is slower than its published formulation beyond the noise; RULE says what that means.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tokprune

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks.naive reads tests.published

from benchmarks.naive.pairs import CASES, PAIRS, Case, Pair, results

QUICK = Case("small, 20 of 144", 1, 20, side=12, heads=8, C=512, D=1024)
QUICK_TILES = Case("small, 36 of 5 x 144", 5, 180, side=12, heads=8, C=512, D=1024)
MARGIN = 1.05
FLOOR_MS = 0.2
RULE = (
    f"slower: in three of four rounds more than {MARGIN - 1:.0%} above the published formulation, and by more "
    f"than {FLOOR_MS} ms of CPU time in the median (below that, the dispatch of a few dozen torch operations decides, "
    f"not arithmetic; one image costs a vision tower seconds on this machine)"
)


@dataclass(frozen=True)
class Clock:
    """CPU and wall time of one call in milliseconds: median and quartiles over the rounds."""

    cpu_ms: float
    cpu_ms_q1: float
    cpu_ms_q3: float
    wall_ms: float


@dataclass(frozen=True)
class Row:
    """One method at one size. ratio: ours / published, median and quartiles over the rounds. same: share of equal
    choices."""

    method: str
    case: str
    rounds: int
    published: Clock
    ours: Clock
    ratio: float
    ratio_q1: float
    ratio_q3: float
    same: float
    differs: str
    verdict: str


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def verdict(published: Sequence[float], ours: Sequence[float]) -> str:
    """`faster`, `even`, `slower` by RULE, or `dispatch`: slower, but by less than FLOOR_MS. published, ours: CPU
    milliseconds of each round, paired."""
    low, _, high = quartiles([b / a for a, b in zip(published, ours, strict=True)])
    gap = statistics.median(ours) - statistics.median(published)
    if low > MARGIN:
        return "slower" if gap > FLOOR_MS else "dispatch"
    return "faster" if high < 1 else "even"


def once(function: Callable[..., Any], inputs: tuple[Any, ...], calls: int) -> tuple[float, float]:
    """CPU and wall milliseconds per call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        function(*inputs)
    return (time.process_time() - cpu) * 1e3 / calls, (time.perf_counter() - wall) * 1e3 / calls


def agreement(one: Any, other: Any) -> float:
    """Share of chosen tokens that two results have in common."""
    shares = []
    for a, b in zip(results(one), results(other), strict=True):
        if a.is_floating_point():
            continue
        for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True):
            chosen, also = _chosen(x), _chosen(y)
            shares.append(len(chosen & also) / max(len(chosen), len(also), 1))
    return sum(shares) / len(shares)


def _chosen(row: Tensor) -> set[int]:
    return set((row.nonzero()[:, 0] if row.dtype == torch.bool else row[row >= 0]).tolist())


@torch.no_grad()
def race(pair: Pair, case: Case, rounds: int = 15, seconds: float = 2.0) -> Row:
    """Run both in turns: `rounds` times, or as often as fits into `seconds` of CPU time, but at least three times."""
    inputs = pair.inputs(case, torch.Generator().manual_seed(0))
    both = (pair.naive, pair.ours)
    start = time.process_time()
    same = agreement(*(function(*inputs) for function in both))  # and warm-up
    calls = [1, 1]
    if time.process_time() - start < 0.3:  # a measurement lasts a few milliseconds at least
        calls = [max(1, round(4.0 / max(once(function, inputs, 1)[0], 1e-3))) for function in both]
    naive: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    start = time.process_time()
    while len(naive) < rounds and (len(naive) < 3 or time.process_time() - start < seconds):
        turn = [(naive, pair.naive, calls[0]), (ours, pair.ours, calls[1])]
        for times, function, count in turn if len(naive) % 2 == 0 else turn[::-1]:
            times.append(once(function, inputs, count))
    a, b = [cpu for cpu, _ in naive], [cpu for cpu, _ in ours]
    low, middle, high = quartiles([y / x for x, y in zip(a, b, strict=True)])
    return Row(
        pair.name,
        case.name,
        len(a),
        clock(naive),
        clock(ours),
        round(middle, 3),
        round(low, 3),
        round(high, 3),
        round(same, 4),
        pair.differs,
        verdict(a, b),
    )


def clock(times: Sequence[tuple[float, float]]) -> Clock:
    """Medians and quartiles of (CPU, wall) milliseconds."""
    low, middle, high = quartiles([cpu for cpu, _ in times])
    wall = statistics.median(wall for _, wall in times)
    return Clock(*(round(x, 4) for x in (middle, low, high, wall)))


def table(rows: Sequence[Row]) -> Table:
    """What the terminal shows."""
    out = Table(title="CPU time per image on one thread, ms: median (quartiles)")
    for name in ("method", "published", "ours", "ours / published", "wall", "wall ours", "same", ""):
        out.add_column(name, justify="left" if name in ("method", "") else "right", no_wrap=True)
    colour = {"faster": "green", "even": "default", "dispatch": "yellow", "slower": "bold red"}
    for case in dict.fromkeys(r.case for r in rows):
        out.add_section()
        out.add_row(f"[bold]{case}")
        for r in (r for r in rows if r.case == case):
            cells = [f"{c.cpu_ms:.3g} ({c.cpu_ms_q1:.3g}, {c.cpu_ms_q3:.3g})" for c in (r.published, r.ours)]
            ratio = f"{r.ratio:.2f} ({r.ratio_q1:.2f}, {r.ratio_q3:.2f})"
            walls = [f"{c.wall_ms:.3g}" for c in (r.published, r.ours)]
            out.add_row(r.method, *cells, ratio, *walls, f"{r.same:.0%}", f"[{colour[r.verdict]}]{r.verdict}")
    return out


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "machine": f"{os.cpu_count()}-core CPU, no GPU used",
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokprune": tokprune.__version__,
        "load": [round(x, 1) for x in os.getloadavg()],
    }


def commit() -> str:
    """The commit that was measured, with a mark when the tree had changes; "unknown" outside a repository."""
    try:
        here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "--", "../tokprune", "."], **here).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Race, print, write. Returns the exit code."""
    names = list(dict.fromkeys(p.name.split()[0] for p in PAIRS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds")
    parser.add_argument("--methods", default=",".join(names), help="comma-separated; default: all")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(arguments)
    wanted = args.methods.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(names)}")
    torch.set_num_threads(1)
    measured = {"commit": commit(), "environment": environment()}  # as things are before the minutes that it takes
    cases = [QUICK, QUICK_TILES] if args.quick else list(CASES.values())
    rounds, seconds = (7, 1.0) if args.quick else (15, 2.0)
    rows = []
    for case in cases:
        for pair in PAIRS:
            if pair.name.split()[0] in wanted and pair.fits(case):
                rows.append(race(pair, case, rounds, seconds))
                print(f"{case.name}: {pair.name} {rows[-1].ratio:.2f}", file=sys.stderr, flush=True)
    Console(width=160).print(table(rows))
    slower = [f"{r.method} ({r.case})" for r in rows if r.verdict == "slower"]
    print(f"Rule: {RULE}.")
    print("same: share of equal choices in float32, where a near-tie may fall either way and carry others along.")
    for name, why in {r.method: r.differs for r in rows if r.differs}.items():
        print(f"{name} may choose other tokens: {why}.")
    close = [f"{r.method} ({r.case})" for r in rows if r.verdict == "dispatch"]
    print(f"Behind by less than {FLOOR_MS} ms (dispatch): {', '.join(close) or 'none'}.")
    print(f"Slower than published: {', '.join(slower) or 'none'}.")
    if args.json:
        data = {
            "type": "tokprune.benchmark.methods",
            "version": 1,
            "command": " ".join(
                ["python", "benchmarks/methods.py", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            **measured,
            "rule": RULE,
            "rows": [asdict(r) for r in rows],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
