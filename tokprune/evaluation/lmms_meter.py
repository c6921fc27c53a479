"""What answering costs, per sample and as means: visual tokens that reach the LLM, times by stage, FLOPs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError
from tokprune.evaluation.errors import EvaluationError
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
CLOCKED = ("ttft", "prefill", "vision", "select", "decode", "total")  # by the clock; the fields end in _ms


def stages_of(model: VLM) -> StageModules | None:
    """The stages to time, or None for a model whose parts are not known."""
    try:
        return find_stages(model)
    except UnsupportedModelError:
        return None


def token_counts(model: VLM, inputs: Inputs, keep: Tensor | None) -> list[tuple[int, int, int]]:
    """For each row visual tokens in the prompt, visual tokens kept, tokens that reach the LLM. keep: (B, L) or None."""
    visual = placeholders(model, inputs["input_ids"])
    mask = inputs.get("attention_mask")
    real = torch.ones_like(visual) if mask is None else mask.bool()
    alive = real if keep is None else real & keep.to(real.device)
    rows = torch.stack([(visual & real).sum(1), (visual & alive).sum(1), alive.sum(1)], 1)
    return [(int(a), int(b), int(c)) for a, b, c in rows.tolist()]


@contextmanager
def timed(device: torch.device, stages: StageModules | None, prompts: int = 1) -> Iterator[JsonObject]:
    """Times in ms of the call made inside, as fields of a record, divided among so many prompts.

    They are there when the block ends; none for a model whose stages are not known.
    """
    times: JsonObject = {}
    if stages is None:
        yield times
        return
    clock = StageClock(device)
    with clock.watch(stages):
        yield times
    took = clock.times()
    times.update({f"{name}_ms": took[name] / prompts for name in CLOCKED})


def averages(records: Sequence[SampleRecord], names: Mapping[str, str]) -> dict[str, float]:
    """Means of some fields over the records that have them. names: field -> name in the result."""
    out = {}
    for measured, name in names.items():
        values = [v for r in records if (v := getattr(r, measured)) is not None]
        if values:
            out[name] = float(sum(values)) / len(values)
    return out


def means(records: Sequence[SampleRecord]) -> dict[str, float]:
    """Mean of everything measured, over the records that have it, and the share of visual tokens kept."""
    out = averages(records, {name: name for name in MEASURED})
    total = sum(r.total_tokens for r in records)
    return out | ({"keep_ratio": sum(r.kept_tokens for r in records) / total} if total else {})


@dataclass
class WorkerOutcome:
    """What a process did in one call. fatal: what ended it. seconds: in the model. counted: FLOP counts per task."""

    records: list[SampleRecord] = field(default_factory=list)
    failures: list[EvaluationError] = field(default_factory=list)
    fatal: EvaluationError | None = None
    seconds: float = 0.0
    counted: Counter[str] = field(default_factory=Counter)


def gather(outcome: WorkerOutcome, processes: int) -> WorkerOutcome:
    """The outcomes of all processes as one, in the order of tasks and rows; every process gets it.

    An error in one process is an error in all: else the others would wait for it for ever.
    """
    import torch.distributed as dist

    if processes < 2 or not dist.is_available() or not dist.is_initialized():
        return outcome
    parts: list[WorkerOutcome | None] = [None] * processes
    dist.all_gather_object(parts, outcome)
    return merge([p for p in parts if p is not None])


def merge(parts: Sequence[WorkerOutcome]) -> WorkerOutcome:
    """Outcomes of several processes as one. Processes run at the same time, so the longest time counts."""
    records = sorted((r for p in parts for r in p.records), key=lambda r: (r.task, r.doc_id))
    failures = sorted((f for p in parts for f in p.failures), key=lambda f: (f.task, f.doc_id or 0))
    fatal = next((p.fatal for p in parts if p.fatal is not None), None)
    return WorkerOutcome(records, failures, fatal, max(p.seconds for p in parts))
