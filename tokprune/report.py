"""What a pruned prefill did, as data, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokprune.adapters.seam import LastRun
    from tokprune.config import PruneConfig


@dataclass(frozen=True)
class StreamReport:
    """One image or video: kept of total candidate tokens, newline separators beside them, what the choice was based on."""

    row: int
    modality: str
    total: int
    kept: int
    separators: int
    separators_kept: int
    question: str | None = None
    question_source: str | None = None
    signals: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The last prefill of a pruned model. Times in ms; on a GPU they are host times, without waiting for the device."""

    model: str
    methods: tuple[str, ...]
    asked: str
    positions: str
    streams: tuple[StreamReport, ...] = ()
    prompt_tokens: int = 0
    physical_tokens: int = 0
    encode_ms: float = 0.0
    select_ms: float = 0.0
    notes: tuple[str, ...] = ()

    @staticmethod
    def build(config: PruneConfig, model: str, last: LastRun | None, notes: list[str]) -> Report:
        """The report of `last`, or of a pruning that has not run yet."""
        methods = tuple(m.info.name for m in config.methods)
        asked = f"ratio {config.ratio:g}" if config.ratio is not None else f"budget {config.budget}"
        if last is None:
            return Report(model, methods, asked, config.positions, notes=(*notes, "no picture has been seen yet"))
        streams = tuple(
            StreamReport(
                s.row,
                s.modality,
                s.total,
                s.kept,
                s.separators,
                s.separators_kept,
                s.question,
                s.question_source,
                dict(s.sources),
                s.note,
            )
            for s in last.streams
        )
        return Report(
            model,
            methods,
            asked,
            last.policy,
            streams,
            last.keep.shape[1],
            last.length,
            last.encode_ms,
            last.select_ms,
            tuple(notes),
        )

    @property
    def total(self) -> int:
        """Candidate visual tokens of all streams."""
        return sum(s.total for s in self.streams)

    @property
    def kept(self) -> int:
        """Visual tokens kept, separators not counted."""
        return sum(s.kept for s in self.streams)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"total": self.total, "kept": self.kept, **asdict(self)}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.model}: {' + '.join(self.methods)}, {self.asked} kept, positions {self.positions}"]
        for s in self.streams:
            share = f" ({s.kept / s.total:.1%})" if s.total else ""
            extra = f", {s.separators_kept}/{s.separators} separators" if s.separators else ""
            lines.append(f"  prompt {s.row}, {s.modality}: {s.kept}/{s.total} tokens{share}{extra}")
            if s.question is not None:
                lines.append(f"    question ({s.question_source}): {s.question}")
            lines += [f"    {name}: {source}" for name, source in s.signals.items()]
            if s.note:
                lines.append(f"    note: {s.note}")
        if self.streams:
            lines.append(
                f"  prompt of {self.prompt_tokens} tokens runs as {self.physical_tokens}; "
                f"encode {self.encode_ms:.1f} ms, select {self.select_ms:.1f} ms"
            )
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])
