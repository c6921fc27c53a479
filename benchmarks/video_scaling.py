"""How time and memory of the video methods grow with the length of the video.

    python benchmarks/video_scaling.py --out benchmarks/results/video_scaling.json       64 to 512 frames, minutes
    python benchmarks/video_scaling.py --frames 128 256 512 1024 --methods quota,evs
    python benchmarks/video_scaling.py --table benchmarks/results/video_scaling.json     the table of a former run

Selection alone: features as a projector hands them over (196 tokens of 896 numbers per frame, float32), a tenth of the
tokens kept. Each method runs in a process of its own, from short to long. Seconds: CPU time of one thread, the least of
some runs. Memory: how far the resident set rose above what was there before the call, which holds the features; its
peak is reset before each call (Linux). The exponent is the slope of log time over log frames: 1 is linear, 2 quadratic.
A method that grows faster than WORST, and than its own maths, fails the run.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from encoder_record import save

from tokprune.methods.base import ConnectorMethod
from tokprune.methods.frames_base import FramesMethod, PerFrame
from tokprune.registry import get_method, list_methods, method_class
from tokprune.tokens import Layout, Query, VisualTokens

GRID, WIDTH, RATIO, SCENE = (14, 14), 896, 0.1, 16
WORST = 1.4  # exponent; above 1 because longer videos leave the caches
# What grows faster than the video by its maths, and with what. All else is linear in the number of frames.
MATHS = {
    "holitom": "T² of the dynamic programme over scene ends (a few numbers each)",
    "prunevid": "T² D of clustering whole frames (DPC-kNN)",
    "wfs_sb": "T M D of comparing frames with those chosen, M in proportion to T here",
}
FLOOR_SECONDS = 0.02  # below that fixed costs decide, not growth


def video(frames: int, needs: tuple[str, ...]) -> VisualTokens:
    """Scenes of 16 frames: a background that stays, tokens that move, noise. Every signal that the method needs."""
    g = torch.Generator().manual_seed(0)
    n = GRID[0] * GRID[1]
    features = torch.empty(frames, n, WIDTH)
    for start in range(0, frames, SCENE):
        features[start : start + SCENE] = torch.randn(n, WIDTH, generator=g)
    for frame in features:
        moving = torch.randperm(n, generator=g)[: n // 4]
        frame[moving] = torch.randn(len(moving), WIDTH, generator=g)
        frame += 0.05 * torch.randn(n, WIDTH, generator=g)
    signals = {}
    for name in needs:
        signals[name] = torch.rand(frames if name == "frame_scores" else frames * n, generator=g)
    layout = Layout.grid(*GRID, frames, "video", timestamps=tuple(float(t) for t in range(frames)))
    query = Query("what does the red car do?", torch.randn(6, WIDTH, generator=g))
    return VisualTokens(features.flatten(0, 1), layout, signals, query)


def method(name: str) -> ConnectorMethod:
    """A connector method, or a frames method with its own reducer."""
    found = get_method(name)
    built = PerFrame(found) if isinstance(found, FramesMethod) else found
    assert isinstance(built, ConnectorMethod)
    return built


def resident() -> dict[str, int]:
    """Bytes of memory this process has now (VmRSS) and had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def measure(name: str, frames: int, repeats: int) -> dict[str, Any]:
    """One point of the curve."""
    chosen = method(name)
    tokens = video(frames, chosen.needs)
    keep = max(1, round(RATIO * len(tokens)))
    seconds, extra = [], []
    for _ in range(repeats):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = resident()["VmRSS"], time.process_time()
        selection = chosen.select(tokens, keep)
        seconds.append(time.process_time() - start)
        extra.append(resident()["VmHWM"] - before)
        if len(selection) != keep:
            raise SystemExit(f"{name} kept {len(selection)} of {keep}")
        del selection
        if seconds[-1] > 1.5:
            break
    inputs = tokens.features.numel() * tokens.features.element_size()
    # The first call also fills what the allocator keeps: the largest rise is the honest one.
    return {"frames": frames, "seconds": min(seconds), "extra_bytes": max(extra), "input_bytes": inputs}


def slope(points: list[dict[str, Any]], key: str, floor: float) -> float | None:
    """Least-squares slope of log(key) over log(frames), of the points above `floor`; None of fewer than three."""
    used = [(math.log(p["frames"]), math.log(p[key])) for p in points if p[key] > floor]
    if len(used) < 3:
        return None
    x, y = (sum(v) / len(used) for v in zip(*used, strict=True))
    return sum((a - x) * (b - y) for a, b in used) / sum((a - x) ** 2 for a, _ in used)


def table(data: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    frames = data["frames"]
    head = [
        "method",
        "stage",
        *(f"{f} frames" for f in frames),
        "time grows as",
        "memory beside the input",
        "by its maths",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(frames) + 2) + "---|"]
    for row in data["rows"]:
        cells = [f"{p['seconds'] * 1e3:.0f} ms" for p in row["points"]]
        grows = "too quick to tell" if row["exponent"] is None else f"T^{row['exponent']:.2f}"
        last = row["points"][-1]
        memory = f"{last['extra_bytes'] / last['input_bytes']:.1f} x"
        cells += [""] * (len(frames) - len(cells)) + [grows, memory, row["maths"]]
        lines.append(f"| `{row['method']}` | {row['stage']} | " + " | ".join(cells) + " |")
    machine = data.get("environment", {}).get("machine", "")
    note = (
        f"CPU time of one thread, {data['tokens_per_frame']} tokens of width {data['width']} per "
        f"frame, {data['ratio']:.0%} kept. {machine}"
    )
    return "\n".join([*lines, "", note.strip()])


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256, 512], help="lengths, ascending")
    parser.add_argument("--methods", help="names, separated by commas; all video methods unless told")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--table", type=Path, help="only print the table of these numbers")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child: measures one method
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    if args.one:
        with torch.no_grad():
            measure(args.one, min(args.frames), 1)  # warm: imports, allocator, thread pools
            for frames in args.frames:
                print(json.dumps(measure(args.one, frames, args.repeats)), flush=True)
        return
    names = args.methods.split(",") if args.methods else videos()
    rows, slow = [], []
    for name in names:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--repeats",
            str(args.repeats),
            "--frames",
            *map(str, args.frames),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr or done.stdout}")
        points = [json.loads(line) for line in done.stdout.splitlines()]
        exponent = slope(points, "seconds", FLOOR_SECONDS)
        rows.append(
            {
                "method": name,
                "stage": method_class(name).stage,
                "complexity": method_class(name).info.complexity,
                "maths": MATHS.get(name, "linear"),
                "exponent": exponent,
                "memory_exponent": slope(points, "extra_bytes", 1e7),
                "points": points,
            }
        )
        times = "  ".join(f"{p['frames']}: {p['seconds']:.3f} s, {p['extra_bytes'] / 1e6:.0f} MB" for p in points)
        grows = "" if exponent is None else f"T^{exponent:.2f}"
        print(f"{name:18} {grows:8} {times}", flush=True)
        if exponent is not None and exponent > (2.1 if name in MATHS else WORST):
            slow.append(f"{name} grows as T^{exponent:.2f}")
    data = {
        "frames": args.frames,
        "tokens_per_frame": GRID[0] * GRID[1],
        "width": WIDTH,
        "ratio": RATIO,
        "dtype": "float32",
        "rows": rows,
    }
    save(args.out, "tokprune.VideoScaling", data)
    print("\n" + table(data))
    if slow:
        raise SystemExit("faster than linear: " + "; ".join(slow))


def videos() -> list[str]:
    """Every method that is made for frames, of the two stages that see them before the LLM."""
    return [n for n in [*list_methods("connector"), *list_methods("frames")] if method_class(n).info.video]


if __name__ == "__main__":
    main()
