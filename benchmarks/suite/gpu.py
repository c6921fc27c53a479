"""The rows that need a GPU: one command of at most eight minutes, random weights, each part saved as it comes.

python -m benchmarks.suite gpu                            one CUDA device
python -m benchmarks.suite gpu --device cpu --tiny        the same code at sizes for any machine
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.suite import llm
from benchmarks.suite.rows import Row, save
from tokprune.methods.base import ConnectorMethod
from tokprune.profiling.build import build_random
from tokprune.profiling.inputs import random_inputs
from tokprune.profiling.presets import preset
from tokprune.profiling.timing import Marks, Measurement, interleave, synchronize
from tokprune.registry import get_method
from tokprune.tokens import Layout, VisualTokens

AIMS = llm.Aims(0.93, share=0.05, decode=0.95)
CHOICES = ((576, 58, 0.15), (2880, 288, 0.6), (2880, 640, 1.3), (8192, 819, 4.0))
"""DivPrune: tokens, kept, and the milliseconds aimed at."""
MODELS = (("llava-1.5-7b", "LLaVA-1.5-7B"), ("qwen2.5-vl-7b", "Qwen2.5-VL-7B"))
BATCHES = (1, 8)


def run(device: str, tiny: bool, out: Path, minutes: float, say: Callable[[str], None] = print) -> list[Row]:
    """Measure part by part until the time is up, and save what there is after each part."""
    end, rows = time.monotonic() + 60 * minutes, []
    for name, part in _parts(device, tiny):
        if time.monotonic() > end:
            say(f"left out, the {minutes:g} minutes are over: {name}")
            continue
        say(f"measuring: {name}")
        found = part()
        rows += found
        for row in found:
            say(str(row))
        save(out, "gpu_tiny" if tiny else "gpu", rows, device)
    return rows


def _parts(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is measured, the most wanted first."""
    yield "DivPrune", partial(choices, device, tiny)
    for name, title in MODELS:
        for batch in BATCHES:
            yield f"{title}, batch {batch}", partial(prefills, name, title, batch, device, tiny)


def choices(device: str, tiny: bool) -> list[Row]:
    """The choice alone, for one picture and for eight at once."""
    rows = []
    width, dtype = (16, torch.float32) if tiny else (4096, torch.bfloat16)
    method = cast(ConnectorMethod, get_method("divprune"))
    for n, keep, target in CHOICES:
        n, keep = (n // 32, keep // 32) if tiny else (n, keep)
        for pictures in (1, 8):
            generator = torch.Generator().manual_seed(0)
            tokens = [
                VisualTokens(torch.randn(n, width, generator=generator).to(device, dtype), Layout.line(n).to(device))
                for _ in range(pictures)
            ]
            what = f"DivPrune, {keep} of {n} tokens of width {width}" + (
                f", {pictures} pictures" if pictures > 1 else ""
            )
            taken = measure(partial(method.select_batch, tokens, [keep] * pictures), device, 20, 3, what)
            rows.append(Row(what, taken, target if pictures == 1 else None, False, "the chain of dependent choices"))
    return rows


def measure(call: Callable[[], object], device: str, repeats: int, warmup: int, name: str) -> Measurement:
    """Time `call()` alone: ms per run, the device synchronised before and after."""

    def once() -> dict[str, float]:
        marks = Marks(device)
        synchronize(device)
        start = marks.now()
        call()
        end = marks.now()
        synchronize(device)
        return {name: marks.milliseconds(start, end)}

    return interleave({name: once}, repeats, warmup, {name: "ms"})[name][name]


def prefills(name: str, title: str, batch: int, device: str, tiny: bool) -> list[Row]:
    """Prefill and decode of a whole model; a batch of several is ragged."""
    known = llm.tiny(name) if tiny else preset(name)
    size = (112, 168) if tiny else (768, 1024)
    dtype = torch.float32 if tiny else torch.bfloat16
    model: Any = build_random(known, device, dtype)
    try:
        inputs = random_inputs(known, model, size) if batch == 1 else llm.ragged(known, model, batch, size)
        label = f"{title}{' (tiny)' if tiny else ''}, {'batch 1' if batch == 1 else f'ragged batch of {batch}'}"
        return llm.prefill_rows(label, model, inputs, AIMS, repeats=2 if tiny else 10, new_tokens=9)
    finally:
        del model
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def wanted() -> list[str]:
    """What stands in docs/performance.md as not measured until a GPU has been there."""
    rows = [f"DivPrune, {keep} of {n} tokens of width 4096: ≤ {target:g} ms" for n, keep, target in CHOICES]
    for _, title in MODELS:
        rows.append(f"{title}, bf16, batch 1 and ragged 8: prefill ≥ {AIMS.ideal:g} of the speed of embeddings by hand")
        rows.append(f"{title}, bf16, batch 1 and ragged 8: selection and hooks ≤ {AIMS.share:g} of the pruned prefill")
    return rows
