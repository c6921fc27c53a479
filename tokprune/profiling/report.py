"""What a profile found: cells of measurements, as data, versioned JSON, and the findings in sentences."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.errors import OptionError
from tokprune.files import checked, read_json, write_json
from tokprune.profiling.stages import STAGES
from tokprune.profiling.timing import Measurement
from tokprune.types import Fields, JsonObject

if TYPE_CHECKING:
    from rich.console import Group

TYPE, VERSION = "tokprune.ProfileReport", 1
PLAIN = "plain"
NOISY = 0.1  # spread of the total, as a share of its median, from which on a report warns


@dataclass(frozen=True)
class RunResult:
    """One way of running the same prompt.

    kind: "plain" (unpruned), "pruned", "ideal" (the same LLM fed the reduced embeddings by hand, no selection cost) or
    "resized" (a smaller picture instead of pruning). visual: visual tokens per prompt that the LLM receives, of
    `visual_full`. prompt: columns that the LLM runs. flops: FLOPs by stage, exact, decode being one step. formulas: the
    papers' numbers (multiply-adds) for the LLM at that length. cache_bytes: KV cache after the run; cache_expected: by
    arithmetic. peak_bytes: peak with weights, of the device where it keeps a count, else of live tensors. tokens: per
    prompt, into the projector, into the LLM (visual, and all), and in each layer's cache after the run.
    """

    name: str
    kind: str
    times: dict[str, Measurement]
    visual: int
    visual_full: int
    prompt: int
    method: str | None = None
    ratio: float | None = None
    flops: JsonObject = field(default_factory=dict)
    formulas: dict[str, int] = field(default_factory=dict)
    cache_bytes: int | None = None
    cache_expected: int | None = None
    peak_bytes: int | None = None
    note: str = ""
    tokens: JsonObject = field(default_factory=dict)

    def flops_total(self, new_tokens: int) -> int:
        """FLOPs from pixels to `new_tokens` tokens."""
        f = self.flops
        if not f:
            return 0
        once = sum(int(f[name]) for name in ("vision", "projector", "select", "prefill"))
        return once + max(new_tokens - 1, 0) * int(f["decode"])

    @property
    def remainder(self) -> float:
        """Share of the whole that no stage explains, the median over the runs; negative where the stages overlap it."""
        samples = self.times["total"].samples
        sums = [sum(self.times[s].samples[i] for s in STAGES) for i in range(len(samples))]
        return float(statistics.median(1 - part / whole for part, whole in zip(sums, samples, strict=True)))

    def to_dict(self) -> JsonObject:
        """Plain data."""
        return {**vars(self), "times": {name: m.to_dict() for name, m in self.times.items()}}

    @staticmethod
    def from_dict(data: Fields) -> RunResult:
        """The cell that `to_dict` wrote."""
        times = {name: Measurement.from_dict(name, m) for name, m in data["times"].items()}
        return RunResult(**{**data, "times": times})


@dataclass(frozen=True)
class ProfileReport:
    """Cells of one profile with everything needed to repeat it. failed: cell -> why it gave no numbers.

    weight_bytes: of the whole model; vision_bytes: the part of them in tower and projector, which decoding does not
    read.
    config: the model's, as transformers writes it. published: what others report of this model, with ours beside it.
    """

    model: str
    cells: tuple[RunResult, ...]
    new_tokens: int
    batch: int
    environment: JsonObject
    parameters: int = 0
    weight_bytes: int = 0
    vision_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    published: tuple[JsonObject, ...] = ()
    command: str = ""
    config: JsonObject = field(default_factory=dict)

    def cell(self, name: str) -> RunResult:
        """The cell called `name`."""
        for cell in self.cells:
            if cell.name == name:
                return cell
        why = f" It failed: {self.failed[name]}." if name in self.failed else ""
        raise OptionError(f"no cell {name!r}; there are: {', '.join(c.name for c in self.cells) or 'none'}.{why}")

    @property
    def plain(self) -> RunResult:
        """The unpruned run; raises OptionError when it failed."""
        return self.cell(PLAIN)

    def find(self, kind: str, ratio: float | None = None) -> RunResult | None:
        """The first cell of a kind at a ratio, None when there is none."""
        return next((c for c in self.cells if c.kind == kind and c.ratio == ratio), None)

    def speedup(self, cell: RunResult, what: str = "total") -> float | None:
        """How many times faster than the plain run, by medians; None when that one failed.

        `decode_tokens_per_s` is read the right way round.
        """
        plain = self.find("plain")
        if plain is None:
            return None
        ours, base = cell.times[what].median, plain.times[what].median
        if what == "decode_tokens_per_s":
            return ours / base if base else 0.0
        return base / ours if ours else 0.0

    @property
    def title(self) -> str:
        """Model, device and setting in a line."""
        env = self.environment
        place = env.get("device_name") or env.get("device", "?")
        return f"{self.model} on {place}, {env.get('dtype', '?')}, batch {self.batch}, {self.new_tokens} new tokens"

    def findings(self, ratio: float | None = None) -> list[str]:
        """What the numbers say, a sentence each: every pruned cell (of one ratio) beside its ideal and its rival."""
        out = []
        for cell in self.cells:
            if cell.kind != "pruned" or self.find("plain") is None or ratio not in (None, cell.ratio):
                continue
            sooner, faster = self.speedup(cell, "ttft") or 0.0, self.speedup(cell) or 0.0
            beside = [
                f"{kind} {self.speedup(other) or 0.0:.2f} x"
                for kind in ("ideal", "resized")
                if (other := self.find(kind, cell.ratio)) is not None
            ]
            rivals = f" ({', '.join(beside)})" if beside else ""
            cost = cell.times["select"].median / cell.times["ttft"].median if cell.times["ttft"].median else 0.0
            out.append(
                f"{cell.name}: first token {sooner:.2f} x as fast, whole answer {faster:.2f} x{rivals}; "
                f"selecting and placing takes {100 * cost:.2g} % of the time to the first token"
            )
        return out

    @property
    def noise(self) -> float:
        """Typical spread of a run's total, as a share of its median."""
        shares = [c.times["total"].spread / c.times["total"].median for c in self.cells if c.times["total"].median]
        return float(statistics.median(shares)) if shares else 0.0

    @property
    def warning(self) -> str:
        """What to think of noisy numbers, empty where they are steady."""
        if self.noise <= NOISY:
            return ""
        return (
            f"noisy: runs of one cell typically spread by {100 * self.noise:.0f} % of their median, so that small "
            f"differences mean nothing; leave the machine alone and raise --repeats"
        )

    @property
    def explained(self) -> str:
        """How well the parts add up to the whole, in words."""
        worst = max((abs(c.remainder) for c in self.cells), default=0.0)
        return f"the stages add up to the total within {100 * worst:.2g} %"

    def to_dict(self) -> JsonObject:
        """Plain data with type and version."""
        lists = {"cells": [c.to_dict() for c in self.cells], "notes": [*self.notes], "published": [*self.published]}
        return {"type": TYPE, "version": VERSION, **vars(self), **lists}

    @staticmethod
    def from_dict(data: object) -> ProfileReport:
        """The report that `to_dict` wrote; refuses other types and newer versions."""
        data = checked(data, TYPE, VERSION, "a profile")
        rest = {k: v for k, v in data.items() if k not in ("type", "version")}
        rest["cells"] = [RunResult.from_dict(c) for c in data["cells"]]
        return ProfileReport(**{**rest, **{name: tuple(rest[name]) for name in ("cells", "notes", "published")}})

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | Path) -> ProfileReport:
        """Read a report that `save` wrote."""
        return ProfileReport.from_dict(read_json(path, "profile"))

    def table(self, width: int | None = None) -> Group:
        """The tables for a terminal: where the time goes, and what it costs in tokens, FLOPs and bytes.

        width: columns of the terminal; below 116, medians stand without their spread.
        """
        from rich.console import Group

        from tokprune.profiling.tables import WIDE, cost_table, time_table, to_rich

        narrow = width is not None and width < WIDE
        times = to_rich(time_table(self, brief=True), self.title, narrow)
        return Group(times, to_rich(cost_table(self, brief=True), None, narrow))


def flops_text(n: float) -> str:
    """A number of FLOPs for people: '3.82 TFLOPs'."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}FLOPs"
    return f"{n:.0f} FLOPs"
