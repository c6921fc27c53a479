"""What a reduced tower did in its last run, as data, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from tokprune.adapters.tower_parts import Tower
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.runtime.encoder.run import EncoderTrace
from tokprune.types import JsonObject


@dataclass(frozen=True)
class EncoderReport:
    """The last run of a reduced tower."""

    model: str
    tower: str
    method: str
    asked: str
    """The ratio or budget that was given, as text."""
    start: int = 0
    """Patches per image (packed towers: of all images together, in units of the connector)."""
    left: tuple[int, ...] = ()
    """Places that are left, one number per image."""
    counts: tuple[int, ...] = ()
    """Rows behind each block, prefix included."""
    work: float = 1.0
    """Rows that the blocks' MLPs saw, as a share of the unreduced tower's."""
    expanded: bool = True
    """The tower's output has full length."""
    notes: tuple[str, ...] = ()

    @staticmethod
    def build(
        model: str,
        tower: Tower,
        method: EncoderMethod,
        asked: str,
        expanded: bool,
        trace: EncoderTrace | None,
        label: str,
    ) -> EncoderReport:
        """The report of `trace`, or of a tower that has not run yet. label: names of the methods."""
        notes = []
        if not tower.cls and method.info.name in ("evit", "ats", "toc3d"):
            notes.append("the tower has no [CLS]; patches are ranked by the attention they receive")
        if tower.fold > 1 and not method.single_patches:
            notes.append(f"{tower.fold} patches are one token of the connector and stay together")
        if method.restores:
            notes.append("tokens that were left out come back, rebuilt, at the tower's end: all of them are handed on")
        if trace is None:
            return EncoderReport(model, tower.family, label, asked, notes=(*notes, "no picture has been seen yet"))
        alive = trace.survivor if trace.survivor.ndim == 2 else trace.survivor[None]
        whole = trace.prefix + trace.assign.shape[-1]
        if not tower.packed and tower.fold > 1:
            whole = tower.prefix + trace.assign.shape[-1] * tower.fold
        work = sum(trace.counts) / (whole * max(len(trace.counts), 1))
        start, left = trace.assign.shape[-1], tuple(alive.sum(1).tolist())
        return EncoderReport(
            model, tower.family, label, asked, start, left, trace.counts, work, expanded, notes=tuple(notes)
        )

    @property
    def total(self) -> int:
        """Patches at the entrance, of all images."""
        return self.start * len(self.left)

    @property
    def kept(self) -> int:
        """Places that are left of them."""
        return sum(self.left)

    def to_dict(self) -> JsonObject:
        """Plain data."""
        return {"total": self.total, "kept": self.kept, **asdict(self)}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.method} inside {self.tower}, {self.asked}"]
        if self.counts:
            low, high = min(self.left), max(self.left)
            left = f"{low}" if low == high else f"{low} to {high}"
            lines.append(
                f"  {self.start} patches -> {left} ({high / max(self.start, 1):.1%}) in each of {len(self.left)} images"
            )
            lines.append(f"  rows behind each block: {', '.join(map(str, self.counts))}")
            lines.append(
                f"  MLP work {self.work:.1%} of the whole tower; output "
                f"{'at full length' if self.expanded else 'reduced'}"
            )
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])
