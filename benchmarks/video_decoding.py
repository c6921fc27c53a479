"""Time to decode 64 frames of a generated 60 s 720p file, per backend; each frame's drawn number is read back.

    python benchmarks/video_decoding.py --out benchmarks/results/video_decoding.json

CPU seconds count the backend's child process, too. Runs are interleaved, so that a busy machine hits all backends
alike. A backend counts only where every frame it returns is the right one; one that cannot run here is left out with
the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.errors import TokpruneError
from tokprune.video import read_video, scan

HEIGHT, WIDTH, RATE, BITS, BLOCK = 720, 1280, 30, 12, 32


def drawn(number: int, ground: np.ndarray) -> np.ndarray:
    """A moving picture with its number as black and white blocks at the top."""
    frame = np.roll(ground, 4 * number, axis=1)
    for bit in range(BITS):
        frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return frame


def number(frame: np.ndarray) -> int:
    """The number drawn into a frame."""
    return sum(
        1 << bit for bit in range(BITS) if frame[8 : BLOCK - 8, bit * BLOCK + 8 : (bit + 1) * BLOCK - 8].mean() > 128
    )


def write(path: Path, seconds: int, gop: int) -> None:
    """Encode the clip: H.264, three B-frames."""
    import av

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8)
    noise = rng.integers(-3, 4, (HEIGHT, WIDTH, 3))
    ground = np.clip(coarse.repeat(16, 0).repeat(16, 1).astype(int) + noise, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"preset": "veryfast", "crf": "23", "bf": "3"}
        for i in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(drawn(i, ground), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def cpu() -> float:
    """CPU seconds of this process and its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(path: Path, frames: int, backends: list[str], repeats: int) -> list[dict[str, Any]]:
    """Interleaved runs of all backends."""
    rows: dict[str, dict[str, Any]] = {b: {"backend": b, "frames": frames, "wall_s": [], "cpu_s": []} for b in backends}
    for _ in range(repeats):
        for name, row in rows.items():
            if "error" in row:
                continue
            wall, used = time.perf_counter(), cpu()
            try:
                video = read_video(path, frames=frames, backend=name)
            except TokpruneError as error:
                row["error"] = str(error)
                continue
            row["wall_s"].append(time.perf_counter() - wall)
            row["cpu_s"].append(cpu() - used)
            row["wrong"] = sum(number(f) != i for f, i in zip(video.frames, video.indices.tolist(), strict=True))
            row["returned"] = len(video)
            row["used"] = video.backend
    for row in rows.values():
        for key in ("wall_s", "cpu_s"):
            row[f"median_{key}"] = statistics.median(row[key]) if row[key] else None
    return list(rows.values())


def verdicts(cells: list[dict[str, Any]], default: str = "auto") -> list[dict[str, Any]]:
    """Per file and number of frames: the fastest backend that is right, in CPU seconds, and how the default
    compares."""
    out = []
    for gop, frames in dict.fromkeys((c["gop"], c["frames"]) for c in cells):
        rows = [c for c in cells if (c["gop"], c["frames"]) == (gop, frames)]
        left_out = {}
        for row in rows:
            if row.get("error"):
                left_out[row["backend"]] = row["error"]
            elif row["wrong"] or row["returned"] != frames:
                left_out[row["backend"]] = f"{row['wrong']} of {row['returned']} frames wrong"
        right = {r["backend"]: r["median_cpu_s"] for r in rows if r["backend"] not in left_out}
        fastest = min(right, key=lambda name: right[name], default=None)
        ratio = right[default] / right[fastest] if fastest is not None and default in right else None
        out.append(
            {
                "gop": gop,
                "frames": frames,
                "default": default,
                "fastest_right": fastest,
                "ratio": ratio,
                "left_out": left_out,
            }
        )
    return out


def versions() -> dict[str, str | None]:
    """The decoders that are installed."""
    found: dict[str, str | None] = {}
    for package in ("av", "decord", "torchcodec"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main(arguments: list[str] | None = None) -> None:
    """Write the clips, time the backends, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--gops", default="250,30")
    parser.add_argument("--frames", default="64,11")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backends", default="auto,torchcodec,decord")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_decoding.json"))
    args = parser.parse_args(arguments)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for gop in (int(g) for g in args.gops.split(",")):
            path = Path(folder) / f"gop{gop}.mp4"
            write(path, args.seconds, gop)
            wall = time.perf_counter()
            scan(path)
            index_s = time.perf_counter() - wall
            for frames in (int(f) for f in args.frames.split(",")):
                for row in measure(path, frames, args.backends.split(","), args.repeats):
                    cells.append({"gop": gop, "megabytes": path.stat().st_size / 1e6, "index_s": index_s, **row})
                    took = "  ".join(
                        f"{k} {row[f'median_{k}']:.2f}" for k in ("wall_s", "cpu_s") if row[f"median_{k}"] is not None
                    )
                    print(
                        f"gop {gop:3d}  {frames:3d} frames  {row['backend']:10s} {took}  "
                        f"wrong {row.get('wrong')}/{row.get('returned')}  {row.get('error', '')}",
                        flush=True,
                    )
    data: dict[str, Any] = {
        "type": "tokprune.video_decoding",
        "version": 1,
        "command": " ".join(["python", *sys.argv]),
        "environment": {
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            **versions(),
        },
        "clip": {"seconds": args.seconds, "height": HEIGHT, "width": WIDTH, "fps": RATE, "codec": "h264"},
        "cells": cells,
        "verdicts": verdicts(cells),
    }
    for found in data["verdicts"]:
        if found["ratio"] is not None:
            print(
                f"gop {found['gop']}, {found['frames']} frames: fastest right backend {found['fastest_right']}; the "
                f"default takes {found['ratio']:.2f} times its CPU seconds"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
