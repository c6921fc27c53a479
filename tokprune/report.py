"""What a pruned prefill did, as data, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from tokprune.types import JsonObject

if TYPE_CHECKING:
    from tokprune.config import PruneConfig
    from tokprune.runtime.records import LastRun


@dataclass(frozen=True)
class StreamReport:
    """One image or video: kept of total candidate tokens, newline separators beside them, what the choice was based on.

    frames: tokens kept of each frame of a video (of a temporal patch, where the model joins two), None for what is
    none.
    timestamps: their seconds, where the model's inputs tell.
    """

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
    frames: tuple[int, ...] | None = None
    timestamps: tuple[float, ...] | None = None

    @property
    def frames_line(self) -> str:
        """How many frames of a video stay, and the least, middle and most tokens of those that do."""
        counts = sorted(n for n in self.frames or () if n)
        if not counts:
            return ""
        middle = (counts[(len(counts) - 1) // 2] + counts[len(counts) // 2]) / 2
        each = f"{counts[0]} / {middle:g} / {counts[-1]}" if counts[0] != counts[-1] else f"{counts[0]}"
        kind = " (least / median / most)" if counts[0] != counts[-1] else ""
        return f"{len(counts)} of {len(self.frames or ())} frames kept, {each} tokens each{kind}"


@dataclass(frozen=True)
class PromptReport:
    """How one prompt spends its prompt budget."""

    row: int
    budget: int
    text: int
    """Text tokens, with those that the processor puts around pictures."""
    cached: int
    """Tokens that the cache brings from earlier turns."""
    visual: int
    """Visual tokens and the separators beside them; the shares of the pictures are in `streams`."""

    def __str__(self) -> str:
        before = f"{self.cached} of earlier turns, " if self.cached else ""
        used = self.text + self.cached + self.visual
        return f"prompt {self.row}: {used} of {self.budget} tokens: {before}{self.text} text, {self.visual} visual"


@dataclass(frozen=True)
class LayerReport:
    """One drop inside the LLM."""

    layer: int
    """In front of which it happens, 0-based."""
    kept: tuple[int, ...]
    """Visual tokens of each prompt from this layer on."""
    counted_below: int = 0
    """How many layers below it the method's paper counts as reduced already."""


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
    score_ms: float = 0.0
    notes: tuple[str, ...] = ()
    depth: int = 0
    """Layers of the LLM, where a method drops tokens inside it."""
    layers: tuple[LayerReport, ...] = ()
    prompts: tuple[PromptReport, ...] = ()
    """How each prompt with pictures spends its prompt budget, where one was given."""

    @staticmethod
    def build(
        config: PruneConfig, model: str, last: LastRun | None, notes: list[str], depth: int = 0, counted_below: int = 0
    ) -> Report:
        """The report of `last`, or of a pruning that has not run yet.

        depth, counted_below: of the LLM and of the method inside it (`DecoderMethod.counted_below`).
        """
        methods = tuple(m.label for m in config.methods)
        asked = "the method's own share" if config.budget is None else f"budget {config.budget}"
        asked = asked if config.ratio is None else f"ratio {config.ratio:g}"
        asked = asked if config.prompt_budget is None else f"at most {config.prompt_budget} tokens a prompt"
        if last is None:
            return Report(model, methods, asked, config.positions, notes=(*notes, "no picture has been seen yet"))
        streams = tuple(
            StreamReport(
                row=s.row,
                modality=s.modality,
                total=s.total,
                kept=s.kept,
                separators=s.separators,
                separators_kept=s.separators_kept,
                question=s.question,
                question_source=s.question_source,
                signals=dict(s.sources),
                note=s.note,
                frames=s.frame_tokens(),
                timestamps=s.layout.timestamps,
            )
            for s in last.streams
        )
        return Report(
            model=model,
            methods=methods,
            asked=asked,
            positions=last.policy,
            streams=streams,
            prompt_tokens=last.keep.shape[1],
            physical_tokens=last.length,
            encode_ms=last.encode_ms,
            select_ms=last.select_ms,
            score_ms=last.score_ms,
            notes=(*notes, *([last.note] if last.note else [])),
            depth=depth,
            layers=tuple(LayerReport(d.layer, d.kept, counted_below) for d in last.drops),
            prompts=tuple(PromptReport(p.row, p.budget, p.text, p.cached, p.visual) for p in last.prompts),
        )

    @property
    def total(self) -> int:
        """Candidate visual tokens of all streams."""
        return sum(s.total for s in self.streams)

    @property
    def kept(self) -> int:
        """Visual tokens kept, separators not counted."""
        return sum(s.kept for s in self.streams)

    def average(self, published: bool = False) -> float | None:
        """Visual tokens that a layer of the LLM works on, mean over its layers, all prompts together; None where no
        method drops any inside. published: as the method's paper counts.
        """
        if not self.depth or not self.layers:
            return None
        left = [self.kept] * self.depth
        for drop in self.layers:
            first = max(drop.layer - (drop.counted_below if published else 0), 0)
            left[first:] = [sum(drop.kept)] * (self.depth - first)
        return sum(left) / self.depth

    def to_dict(self) -> JsonObject:
        """Plain data."""
        averages = {} if not self.layers else {"average": self.average(), "published_average": self.average(True)}
        return {"total": self.total, "kept": self.kept, **averages, **asdict(self)}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.model}: {' + '.join(self.methods)}, {self.asked} kept, positions {self.positions}"]
        for s in self.streams:
            share = f" ({s.kept / s.total:.1%})" if s.total else ""
            extra = f", {s.separators_kept}/{s.separators} separators" if s.separators else ""
            lines.append(f"  prompt {s.row}, {s.modality}: {s.kept}/{s.total} tokens{share}{extra}")
            if s.frames_line:
                lines.append(f"    {s.frames_line}")
            if s.question is not None:
                lines.append(f"    question ({s.question_source}): {s.question}")
            lines += [f"    {name}: {source}" for name, source in s.signals.items()]
            if s.note:
                lines.append(f"    note: {s.note}")
        lines += [f"  {prompt}" for prompt in self.prompts]
        if self.streams:
            lines.append(
                f"  prompt of {self.prompt_tokens} tokens runs as {self.physical_tokens}; "
                f"encode {self.encode_ms:.1f} ms, "
                + (f"score frames {self.score_ms:.1f} ms, " if self.score_ms else "")
                + f"select {self.select_ms:.1f} ms"
            )
        lines += self._layer_lines()
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])

    def _layer_lines(self) -> list[str]:
        """What is left in the layers of the LLM."""
        average, published = self.average(), self.average(published=True)
        if average is None or published is None:
            return []
        steps = ", ".join(f"{sum(d.kept)} from layer {d.layer} on" for d in self.layers)
        share = f" ({average / self.kept:.1%} of what enters it)" if self.kept else ""
        line = f"  layers of the LLM: {self.kept} visual tokens, {steps}; average over {self.depth} layers "
        line += f"{average:.1f}{share}"
        return [line if published == average else f"{line}, {published:.1f} as the method's paper counts"]
