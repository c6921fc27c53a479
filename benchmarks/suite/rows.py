"""A row of docs/performance.md: what was measured, what was aimed at, and what bounds it; and the JSON of a section."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.encoder_record import commit
from tokprune.environment import environment
from tokprune.files import checked
from tokprune.profiling.timing import Measurement, interleave

TYPE, VERSION = "tokprune.bench", 1
WITHIN = 1.2
"""Times its limit that a quantity may take to count as being at it."""
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One quantity with its target."""

    what: str
    measured: Measurement
    """A sample a round; of pairs, the ratio of the two runs of that round."""
    target: float | None = None
    """None: told without being aimed at."""
    at_least: bool = False
    """Whether the target is a lower bound."""
    limit: str = ""
    """What bounds the quantity, in a line; shown where the target is missed."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Medians that the quantity was made from. over_limit: how many times its limit it took, where that was measured in
    the same rounds."""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        return self.measured.median >= self.target if self.at_least else self.measured.median <= self.target

    @property
    def verdict(self) -> str:
        """In words."""
        if self.met is not False:
            return "met" if self.met else ""
        over = self.beside.get("over_limit", math.inf)
        return f"at its limit, {over:.2f} times {self.limit}" if over <= WITHIN else f"missed; limit: {self.limit}"

    @property
    def aim(self) -> str:
        """The target in words."""
        if self.target is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {self.target:g} {self.measured.unit}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        names = ("what", "target", "at_least", "limit", "beside")
        return {**{n: getattr(self, n) for n in names}, "measured": self.measured.to_dict(), "met": self.met}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        """The row that `to_dict` wrote."""
        rest = {k: v for k, v in data.items() if k not in ("measured", "met")}
        return Row(measured=Measurement.from_dict(data["what"], data["measured"]), **rest)

    def __str__(self) -> str:
        return f"{self.what}: {self.measured} ({self.aim or 'no target'}) {self.verdict}".rstrip()


def number(what: str, value: float, unit: str = "") -> Measurement:
    """A quantity that is counted, not timed: the same every time."""
    return Measurement(what, unit, (float(value),))


def ratio(what: str, above: Sequence[float], below: Sequence[float]) -> Measurement:
    """Round by round, one run over the other of its pair."""
    return Measurement(what, "", tuple(a / b for a, b in zip(above, below, strict=True)))


def paired(cells: Mapping[str, Callable[[], Any]], clock: Callable[[], float], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each cell by round, in changing order, after a round to warm up. clock: in seconds."""

    def timed(call: Callable[[], Any]) -> Callable[[], dict[str, float]]:
        def once() -> dict[str, float]:
            start = clock()
            call()
            return {"ms": 1e3 * (clock() - start)}

        return once

    found = interleave({name: timed(call) for name, call in cells.items()}, repeats, 1, {"ms": "ms"})
    return {name: list(times["ms"].samples) for name, times in found.items()}


def save(folder: Path, section: str, rows: Sequence[Row], device: str = "cpu") -> Path:
    """Write a section's rows with what is needed to repeat it."""
    told = re.sub(r"--out[ =]\S+ ?", "", " ".join(sys.argv[1:]))  # where it was written says nothing of the numbers
    data = {
        "type": TYPE,
        "version": VERSION,
        "section": section,
        "command": f"python -m benchmarks.suite {told}".rstrip(),
        "commit": commit(),
        "environment": environment(device) | {"cpus": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()]},
        "rows": [row.to_dict() for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench_{section}.json"
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> dict[str, Any]:
    """A section as `save` wrote it, its rows as rows."""
    data = dict(checked(json.loads(path.read_text(encoding="utf-8")), TYPE, VERSION, path.name))
    return data | {"rows": [Row.from_dict(row) for row in data["rows"]]}


def threads(count: int | None = None) -> None:
    """CPU threads of what follows; all cores by default."""
    torch.set_num_threads(count or os.cpu_count() or 1)
