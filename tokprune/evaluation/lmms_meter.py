"""What answering costs: visual tokens that reach the LLM, times by stage, FLOPs; per sample and as means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.profiling.runs import placeholders
from tokprune.profiling.stages import StageModules, find_stages
from tokprune.profiling.timing import StageClock
from tokprune.types import VLM, Inputs, JsonObject


@dataclass(frozen=True)
class SampleRecord:
    """One answered request. Times in ms; those of a batch are divided by its size, so that they add up.

    total_tokens, kept_tokens: visual tokens (separators included) in the prompt, and of these the ones that reach the
    LLM's first layer. prompt_tokens: everything that does. ttft_ms: from pixels in the model to the first token;
    prefill_ms: of the LLM alone. flops: from pixels to the last token; None where it was not counted.
    """

    task: str
    doc_id: int
    total_tokens: int
    kept_tokens: int
    prompt_tokens: int
    new_tokens: int
    ttft_ms: float | None = None
    prefill_ms: float | None = None
    vision_ms: float | None = None
    select_ms: float | None = None
    decode_ms: float | None = None
    total_ms: float | None = None
    flops: int | None = None

    def to_dict(self) -> JsonObject:
        """Plain data without what was not measured."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


MEASURED = tuple(f.name for f in dataclasses.fields(SampleRecord) if f.name not in ("task", "doc_id"))
_FROM_CLOCK = {
    "ttft": "ttft_ms",
    "prefill": "prefill_ms",
    "vision": "vision_ms",
    "select": "select_ms",
    "decode": "decode_ms",
    "total": "total_ms",
}


def stages_of(model: VLM) -> StageModules | None:
    """The stages to time, or None for a model whose parts are not known."""
    from tokprune.errors import UnsupportedModelError

    try:
        return find_stages(model)
    except UnsupportedModelError:
        return None


def token_counts(model: VLM, inputs: Inputs, keep: Tensor | None) -> list[tuple[int, int, int]]:
    """Visual tokens in the prompt, visual tokens kept, and tokens that reach the LLM, for each row. keep: (B, L) or
    None."""
    visual = placeholders(model, inputs["input_ids"])
    mask = inputs.get("attention_mask")
    real = torch.ones_like(visual) if mask is None else mask.bool()
    alive = real if keep is None else real & keep.to(real.device)
    rows = torch.stack([(visual & real).sum(1), (visual & alive).sum(1), alive.sum(1)], 1)
    return [(int(a), int(b), int(c)) for a, b, c in rows.tolist()]


def clock_times(clock: StageClock, prompts: int) -> JsonObject:
    """The clock's times as fields of a record, divided among so many prompts."""
    times = clock.times()
    return {field: times[name] / prompts for name, field in _FROM_CLOCK.items()}


def averages(records: Sequence[SampleRecord], names: Mapping[str, str]) -> dict[str, float]:
    """Means of some fields over the records that have them. names: field -> its name in the result."""
    out = {}
    for field, name in names.items():
        values = [v for r in records if (v := getattr(r, field)) is not None]
        if values:
            out[name] = float(sum(values)) / len(values)
    return out


def means(records: Sequence[SampleRecord]) -> dict[str, float]:
    """Mean of everything measured, over the records that have it, and the share of visual tokens kept."""
    out = averages(records, {name: name for name in MEASURED})
    total = sum(r.total_tokens for r in records)
    return out | ({"keep_ratio": sum(r.kept_tokens for r in records) / total} if total else {})
