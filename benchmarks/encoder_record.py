"""What the encoder benchmarks write beside their numbers, and the clock they share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokprune.environment import machine
from tokprune.profiling.flops import count

ROOT = Path(__file__).parent.parent


def commit() -> str | None:
    """The commit that is measured, marked when more than results differs from it; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def save(path: Path | None, kind: str, data: dict[str, Any]) -> None:
    """Write numbers as JSON, with the command, the commit and the machine."""
    if path is None:
        return
    command = " ".join(["python", *sys.argv])
    head = {"type": kind, "version": 2, "command": command, "commit": commit(), "environment": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **data}, indent=2) + "\n", encoding="utf-8")


def flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention of one call; a multiply-add is two."""
    return count(run)[0]


def wall(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start
