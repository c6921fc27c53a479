"""What a profile found: cells of measurements, as data, versioned JSON and a table with units."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.errors import OptionError
from tokprune.profiling.memory import readable
from tokprune.profiling.timing import Measurement

if TYPE_CHECKING:
    from rich.table import Table

TYPE, VERSION = "tokprune.ProfileReport", 1
PLAIN = "plain"
HEADS = (
    "run",
    "visual tokens",
    "vision ms",
    "select ms",
    "prefill ms",
    "TTFT ms",
    "decode tok/s",
    "total ms",
    "faster",
    "KV cache",
    "peak",
    "FLOPs",
)


@dataclass(frozen=True)
class Cell:
    """One way of running the same prompt.

    kind: "plain" (unpruned), "pruned", "ideal" (the same LLM fed the reduced embeddings by hand, no selection cost) or
    "resized" (a smaller picture instead of pruning). visual: visual tokens per prompt that the LLM receives, of `visual_full`.
    prompt: columns that the LLM runs. flops: FLOPs by stage, exact, decode being one step. formulas: the papers' numbers
    (multiply-adds) for the LLM at that length. cache_bytes: KV cache after the run; cache_expected: by arithmetic.
    peak_bytes: peak of the device with weights, None where no such count exists.
    """

    name: str
    kind: str
    times: dict[str, Measurement]
    visual: int
    visual_full: int
    prompt: int
    method: str | None = None
    ratio: float | None = None
    flops: dict[str, Any] = field(default_factory=dict)
    formulas: dict[str, int] = field(default_factory=dict)
    cache_bytes: int | None = None
    cache_expected: int | None = None
    peak_bytes: int | None = None
    note: str = ""

    def flops_total(self, new_tokens: int) -> int:
        """FLOPs from pixels to `new_tokens` tokens."""
        f = self.flops
        if not f:
            return 0
        once = sum(int(f[name]) for name in ("vision", "projector", "select", "prefill"))
        return once + max(new_tokens - 1, 0) * int(f["decode"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {"times": {name: m.to_dict() for name, m in self.times.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Cell:
        """The cell that `to_dict` wrote."""
        return Cell(**{**data, "times": {name: Measurement.from_dict(name, m) for name, m in data["times"].items()}})


@dataclass(frozen=True)
class ProfileReport:
    """Cells of one profile with everything needed to repeat it. failed: cell -> why it gave no numbers.

    weight_bytes: of the whole model; vision_bytes: the part of them in tower and projector, which decoding does not read.
    """

    model: str
    cells: tuple[Cell, ...]
    new_tokens: int
    batch: int
    environment: dict[str, Any]
    parameters: int = 0
    weight_bytes: int = 0
    vision_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    published: tuple[str, ...] = ()

    def cell(self, name: str) -> Cell:
        """The cell called `name`."""
        for found in self.cells:
            if found.name == name:
                return found
        raise OptionError(f"no cell {name!r}; there are: {', '.join(c.name for c in self.cells)}.")

    @property
    def plain(self) -> Cell:
        """The unpruned run."""
        return self.cell(PLAIN)

    def speedup(self, cell: Cell, what: str = "total") -> float:
        """How many times faster than the plain run, by medians; `decode_tokens_per_s` is read the right way round."""
        ours, base = cell.times[what].median, self.plain.times[what].median
        if what == "decode_tokens_per_s":
            return ours / base if base else 0.0
        return base / ours if ours else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data with type and version."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data |= {
            "cells": [c.to_dict() for c in self.cells],
            "notes": list(self.notes),
            "published": list(self.published),
        }
        return {"type": TYPE, "version": VERSION, **data}

    @staticmethod
    def from_dict(data: Any) -> ProfileReport:
        """The report that `to_dict` wrote; refuses other types and newer versions."""
        if not isinstance(data, dict) or data.get("type") != TYPE:
            raise OptionError(f'not a profile: expected an object with "type": "{TYPE}".')
        if data.get("version") != VERSION:
            raise OptionError(
                f"profile version {data.get('version')!r} is not readable; this tokprune reads {VERSION}."
            )
        rest = {k: v for k, v in data.items() if k not in ("type", "version")}
        cells = tuple(Cell.from_dict(c) for c in data["cells"])
        return ProfileReport(
            **{**rest, "cells": cells, "notes": tuple(data["notes"]), "published": tuple(data["published"])}
        )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> ProfileReport:
        """Read a report that `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise OptionError(f"cannot read the profile {path}: {error}") from error
        return ProfileReport.from_dict(data)

    def table(self) -> Table:
        """The cells as a rich table; times are medians over the runs with half the interquartile range."""
        from rich.table import Table

        env = self.environment
        place = env.get("device_name") or env.get("device", "?")
        title = f"{self.model} on {place}, {env.get('dtype', '?')}, batch {self.batch}, {self.new_tokens} new tokens"
        table = Table(title=title, caption=self._caption(), title_justify="left", caption_justify="left")
        rows = [self._row(cell) for cell in self.cells]
        for i, head in enumerate(HEADS):
            if any(row[i] for row in rows):  # no peak on devices that keep no count
                table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(text for i, text in enumerate(row) if any(r[i] for r in rows)))
        return table

    def _row(self, cell: Cell) -> list[str]:
        def ms(*names: str) -> str:
            value = sum(cell.times[n].median for n in names)
            spread = max(cell.times[n].spread for n in names)
            return f"{value:.1f} ± {spread:.1f}" if value < 100 else f"{value:.0f} ± {spread:.0f}"

        share = f" ({100 * cell.visual / cell.visual_full:.3g} %)" if cell.visual < cell.visual_full else ""
        return [
            cell.name,
            f"{cell.visual}{share}",
            ms("vision", "projector"),
            ms("select"),
            ms("prefill"),
            ms("ttft"),
            f"{cell.times['decode_tokens_per_s'].median:.1f}",
            ms("total"),
            "1" if cell.kind == "plain" else f"{self.speedup(cell):.2f} x",
            "" if cell.cache_bytes is None else readable(cell.cache_bytes),
            "" if cell.peak_bytes is None else readable(cell.peak_bytes),
            flops_text(cell.flops_total(self.new_tokens)) if cell.flops else "",
        ]

    def _caption(self) -> str:
        lines = [
            f"median ± half the interquartile range of {self.environment.get('repeats', '?')} runs in changing order"
        ]
        if any(c.kind == "ideal" for c in self.cells):
            lines.append("ideal: the same LLM fed the reduced embeddings by hand, without the cost of selecting")
        if any(c.kind == "resized" for c in self.cells):
            lines.append("resized: a smaller picture with about as many tokens, nothing pruned")
        lines += [f"{name}: {why}" for name, why in self.failed.items()]
        return "\n".join([*lines, *self.notes])


def flops_text(n: float) -> str:
    """A number of FLOPs for people: '3.82 TFLOPs'."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}FLOPs"
    return f"{n:.0f} FLOPs"
