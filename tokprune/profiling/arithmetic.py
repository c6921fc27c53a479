"""A preset's cost at several ratios without weights: tokens, FLOPs by stage, the papers' formulas, cache and weight bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokprune.budget import check_ratio, kept
from tokprune.profiling import formulas
from tokprune.profiling.build import build_meta, config_of, vision_calls
from tokprune.profiling.memory import kv_cache_bytes_of, readable
from tokprune.profiling.presets import Preset
from tokprune.profiling.report import flops_text
from tokprune.viz.resolution import Size

if TYPE_CHECKING:
    from rich.table import Table

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
    """Rows of one preset and picture size."""

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
    published: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data with type and version."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rows = [vars(row) | {"total": row.total(self.new_tokens)} for row in self.rows]
        return {"type": TYPE, "version": VERSION, **data, "rows": rows, "published": list(self.published)}

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """The rows as a rich table, with the published numbers below."""
        from rich.table import Table

        what = f"{self.size[0]} x {self.size[1]} px" + (f", {self.frames} frames" if self.frames else "")
        title = f"{self.title}: {self.parameters / 1e9:.2f} G parameters ({readable(self.weight_bytes)} as {self.dtype}), {what}, {self.text} text tokens, batch {self.batch}"
        notes = [
            "FLOPs are exact: 2 per multiply-add, torch's counter for the tower, closed form for the LLM; decode is one step",
            f"total: from pixels to {self.new_tokens} new tokens; papers count multiply-adds of the visual tokens in the LLM alone",
            *(f"published: {line}" for line in self.published),
        ]
        table = Table(title=title, caption="\n".join(notes), title_justify="left", caption_justify="left")
        first = next(iter(formulas.FORMULAS))
        for i, head in enumerate(
            (
                "ratio",
                "visual tokens",
                "prompt",
                "vision",
                "prefill",
                "decode",
                "total",
                "of full",
                "KV cache",
                f"papers: {first}",
            )
        ):
            table.add_column(head, justify="right" if i else "left")
        for row in self.rows:
            whole = self.rows[0].total(self.new_tokens)
            table.add_row(
                f"{row.ratio:g}",
                str(row.visual),
                str(row.prompt),
                flops_text(row.vision + row.projector),
                flops_text(row.prefill),
                flops_text(row.decode),
                flops_text(row.total(self.new_tokens)),
                f"{100 * row.total(self.new_tokens) / whole:.3g} %",
                readable(row.cache_bytes),
                f"{row.formulas[first] / 1e12:.3g} T",
            )
        return table


def arithmetic(
    preset: Preset,
    ratios: Sequence[float] = (0.5, 0.25, 0.1),
    *,
    size: Size | None = None,
    frames: int | None = None,
    text: int = 64,
    batch: int = 1,
    new_tokens: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Arithmetic:
    """The cost of a preset's model at ratio 1 and at `ratios`, in seconds on any machine.

    size: (height, width) of the picture, the preset's usual one by default. frames: pictures of a clip. text: tokens
    around the picture. Separators (newline tokens) shrink with the rows that lose all their tokens; here they are counted
    as if kept tokens lay evenly: all of them while a row keeps one, else one per kept token. Connector-stage pruning.
    """
    size = size or preset.default_size
    visual = preset.count(size, frames)
    model = build_meta(preset, dtype)
    vision, projector = vision_calls(model, preset, size, frames)
    shape, config = preset.decoder, config_of(preset)
    rows = []
    for ratio in [1.0, *[r for r in map(check_ratio, ratios) if r < 1.0]]:
        keep = kept(visual.tokens, ratio)
        prompt = text + keep + min(visual.separators, keep)
        rows.append(
            ArithmeticRow(
                ratio,
                keep,
                visual.tokens,
                prompt,
                batch * vision,
                batch * projector,
                batch * formulas.exact_prefill(shape, prompt),
                batch * formulas.exact_decode(shape, prompt),
                kv_cache_bytes_of(config, prompt + new_tokens - 1, batch, dtype),
                {name: batch * formulas.formula_total(f, keep, shape) for name, f in formulas.FORMULAS.items()},
            )
        )
    parameters = sum(p.numel() for p in model.parameters())
    return Arithmetic(
        preset.name,
        preset.title,
        size,
        frames,
        text,
        batch,
        new_tokens,
        str(dtype).removeprefix("torch."),
        parameters,
        parameters * dtype.itemsize,
        tuple(rows),
        preset.published,
    )
