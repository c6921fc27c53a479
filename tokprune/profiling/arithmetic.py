"""A preset's cost at several ratios without weights: tokens, FLOPs by stage, the papers' formulas, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tokprune.budget import check_ratio, kept
from tokprune.profiling import formulas
from tokprune.profiling.build import build_meta, config_of, vision_calls
from tokprune.profiling.memory import kv_cache_bytes_of, readable
from tokprune.profiling.presets import Preset
from tokprune.profiling.published import CAUTION, comparison, lines
from tokprune.profiling.resolution import Size
from tokprune.profiling.tables import Column, bytes_value, flops_value, table_of, to_rich
from tokprune.types import JsonObject
from tokprune.viz.html import Table, Value

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

TYPE, VERSION = "tokprune.Arithmetic", 1


@dataclass(frozen=True)
class ArithmeticRow:
    """One ratio. visual: candidate tokens kept, of visual_full; prompt: with separators and text. All FLOPs count 2 per
    multiply-add; `formulas` are the papers' multiply-adds of the LLM over the visual tokens alone."""

    ratio: float
    visual: int
    visual_full: int
    prompt: int
    vision: int
    projector: int
    prefill: int
    decode: int
    cache_bytes: int
    formulas: dict[str, int]

    def total(self, new_tokens: int) -> int:
        """FLOPs from pixels to `new_tokens` tokens."""
        return self.vision + self.projector + self.prefill + max(new_tokens - 1, 0) * self.decode


@dataclass(frozen=True)
class Arithmetic:
    """Rows of one preset and picture size. published: what others report, as `published.comparison` makes it."""

    preset: str
    title: str
    size: Size
    frames: int | None
    text: int
    batch: int
    new_tokens: int
    dtype: str
    parameters: int
    weight_bytes: int
    rows: tuple[ArithmeticRow, ...]
    published: tuple[JsonObject, ...] = ()
    sources: tuple[str, ...] = ()

    def to_dict(self) -> JsonObject:
        """Plain data with type and version."""
        rows = [vars(row) | {"total": row.total(self.new_tokens)} for row in self.rows]
        return {"type": TYPE, "version": VERSION, **vars(self), "rows": rows, "published": list(self.published)}

    @property
    def heading(self) -> str:
        """Model and case in a line."""
        what = f"{self.size[0]} x {self.size[1]} px" + (f", {self.frames} frames" if self.frames else "")
        return (
            f"{self.title}: {self.parameters / 1e9:.2f} G parameters ({readable(self.weight_bytes)} as {self.dtype}), "
            f"{what}, {self.text} text tokens, batch {self.batch}"
        )

    def plain_table(self) -> Table:
        """The rows with their units."""
        first, new, whole = next(iter(formulas.FORMULAS)), self.new_tokens, self.rows[0].total(self.new_tokens)

        def of_full(row: ArithmeticRow) -> Value:
            return Value(f"{100 * row.total(new) / whole:.3g} %", row.total(new) / whole)

        def by_formula(row: ArithmeticRow) -> Value:
            return Value(f"{row.formulas[first] / 1e12:.3g} T", row.formulas[first])

        columns = [
            Column("ratio", "", lambda row: f"{row.ratio:g}"),
            Column("visual", "tokens", lambda row: row.visual),
            Column("prompt", "tokens", lambda row: row.prompt),
            Column("vision", "FLOPs", lambda row: flops_value(row.vision + row.projector)),
            Column("prefill", "FLOPs", lambda row: flops_value(row.prefill)),
            Column("decode step", "FLOPs", lambda row: flops_value(row.decode)),
            Column("all", "FLOPs", lambda row: flops_value(row.total(new))),
            Column("of full", "", of_full),
            Column("KV cache", "", lambda row: bytes_value(row.cache_bytes)),
            Column(first.split(" ")[0], "multiply-adds", by_formula),
        ]
        notes = [
            "FLOPs are exact, 2 per multiply-add: torch's counter on the meta device for the tower, closed form for "
            "the LLM. Nothing was run; a method's own scoring is not in it. Connector stage: each layer sees the kept "
            "tokens.",
            f"all: from pixels to {new} new tokens. Last column: the papers' {first}, visual tokens alone.",
        ]
        return table_of(columns, self.rows, "\n".join(notes))

    def table(self, width: int | None = None) -> Group:
        """The rows for a terminal, with what others report below."""
        from rich.console import Group
        from rich.markup import escape

        parts: list[RenderableType] = [to_rich(self.plain_table(), self.heading)]
        if self.published:
            parts += ["Published, and ours beside it:", *(escape(f"- {x}") for x in lines(list(self.published)))]
            parts.append(f"[dim]{escape(CAUTION)}[/]")
        return Group(*parts)


def _tower(preset: Preset, size: Size, frames: int | None, dtype: torch.dtype) -> tuple[int, int, int]:
    """FLOPs of tower and projector, and the parameters of the whole model, all counted on the meta device."""
    model = build_meta(preset, dtype)
    return *vision_calls(model, preset, size, frames), sum(p.numel() for p in model.parameters())


def arithmetic(
    preset: Preset,
    ratios: Sequence[float] = (0.5, 0.25, 0.1),
    *,  # options by name: this is a public entry point
    size: Size | None = None,
    frames: int | None = None,
    text: int = 64,
    batch: int = 1,
    new_tokens: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seen: float | None = None,
) -> Arithmetic:
    """The cost of a preset's model at ratio 1 and at `ratios`, in seconds on any machine.

    size: (height, width) of the picture, the preset's usual one by default. frames: pictures of a clip. text: tokens
    around the picture. Separators (newline tokens) shrink with the rows that lose all their tokens; here they are
    counted as if kept tokens lay evenly: all while a row keeps one, else one per kept token. Connector-stage pruning.
    seen: FLOPs of tower and projector, where they are known already (models that are no preset, `loaded`).
    """
    size = size or preset.default_size
    visual = preset.count(size, frames)
    vision, projector, parameters = (
        _tower(preset, size, frames, dtype) if seen is None else (round(seen), 0, preset.parameters)
    )
    shape, config = preset.decoder, config_of(preset)
    rows = []
    for ratio in [1.0, *[r for r in map(check_ratio, ratios) if r < 1.0]]:
        keep = kept(visual.tokens, ratio)
        prompt = text + keep + min(visual.separators, keep)
        rows.append(
            ArithmeticRow(
                ratio=ratio,
                visual=keep,
                visual_full=visual.tokens,
                prompt=prompt,
                vision=batch * vision,
                projector=batch * projector,
                prefill=batch * formulas.exact_prefill(shape, prompt),
                decode=batch * formulas.exact_decode(shape, prompt),
                cache_bytes=kv_cache_bytes_of(config, prompt + new_tokens - 1, batch, dtype),
                formulas={
                    name: batch * formulas.formula_total(f, keep, shape) for name, f in formulas.FORMULAS.items()
                },
            )
        )
    return Arithmetic(
        preset=preset.name,
        title=preset.title,
        size=size,
        frames=frames,
        text=text,
        batch=batch,
        new_tokens=new_tokens,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        rows=tuple(rows),
        published=tuple(comparison(preset.published, shape, vision + projector)),
        sources=preset.sources,
    )
