"""Asks one model the same questions at several keep ratios and methods: the demo's table, in numbers."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

import tokprune
from tokprune.demo.scenes import Example
from tokprune.profiling.flops import stage_flops
from tokprune.profiling.stages import find_stages, watch

ONE_WORD = " Answer with one word."
ANSWER_TOKENS = 3  # the demo VLM says one word and stops
FREE_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Cell:
    """One method at one keep ratio. kept, total: visual tokens per question (mean). prefill_ms: LLM prefill per question.

    flops: of one answer, pixels to last token, counted by torch (a real model at the longest answer it may give). accuracy and per_type: share answered right.
    """

    method: str
    ratio: float
    accuracy: float
    kept: float
    total: float
    prefill_ms: float
    flops: int
    questions: int
    correct: int
    per_type: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan_cells(methods: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float]]:
    """The (method, ratio) cells of a sweep; `none` ignores the ratio and runs once, as the baseline."""
    cells = [("none", 1.0)] if "none" in methods else []
    return cells + [(m, r) for m in methods if m != "none" for r in sorted(ratios, reverse=True)]


def build_inputs(processor: Any, questions: Sequence[str], images: Sequence[Image.Image], model: Any) -> Any:
    """Processor outputs of one batch of single-picture questions, on the model's device and dtype."""
    texts = []
    for question in questions:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        texts.append(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    batch = processor(text=texts, images=[[image] for image in images], return_tensors="pt", padding=True)
    return batch.to(model.device, model.dtype)


def is_right(answer: str, expected: str) -> bool:
    """Whether the first word of a free answer, or its only matching word, is the expected one."""
    words = re.findall(r"[a-z0-9-]+", answer.lower())
    return bool(words) and words[0] == expected.lower()


@torch.no_grad()
def answer_batch(model: Any, processor: Any, inputs: Any, new_tokens: int) -> list[str]:
    """Greedy answers to one prepared batch."""
    generated = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    words = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in words]


class _PrefillClock:
    """Adds up the time of the first call of the LLM in each generate()."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.start, self.armed = device, 0.0, 0.0, False

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self, part: str) -> None:
        if part == "language" and self.armed:
            self.start = self._now()

    def leave(self, part: str) -> None:
        if part == "language" and self.armed:
            self.seconds += self._now() - self.start
            self.armed = False


def run_cell(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    method: str,
    ratio: float,
    *,
    batch_size: int = 25,
    own_model: bool = True,
    scorer: Any = None,
    tick: Callable[[int], None] = lambda done: None,
) -> Cell:
    """Ask all examples at one setting; the model is given back as it was.

    own_model: the demo VLM, which answers in one word without being told. tick: called with the questions done.
    """
    suffix = "" if own_model else ONE_WORD

    def inputs_of(batch: Sequence[Example]) -> Any:
        return build_inputs(processor, [e.question + suffix for e in batch], [e.image for e in batch], model)

    return ask_all(
        model,
        processor,
        examples,
        inputs_of,
        method,
        ratio,
        batch_size=batch_size,
        own_model=own_model,
        scorer=scorer,
        tick=tick,
    )


def ask_all(
    model: Any,
    processor: Any,
    examples: Sequence[Any],
    inputs_of: Callable[[Sequence[Any]], Any],
    method: str,
    ratio: float,
    *,
    batch_size: int,
    own_model: bool,
    scorer: Any,
    tick: Callable[[int], None],
) -> Cell:
    """Ask all examples, of pictures or of clips, at one setting. inputs_of: processor outputs of a batch of them."""
    new_tokens = ANSWER_TOKENS if own_model else FREE_ANSWER_TOKENS
    hits: dict[str, list[bool]] = defaultdict(list)
    kept = total = 0
    started = time.perf_counter()
    clock = _PrefillClock(model.device)
    with tokprune.apply(model, method, ratio=ratio, processor=processor, scorer=scorer) as pruning:
        with watch(find_stages(model), clock.enter, clock.leave):
            for at in range(0, len(examples), batch_size):
                batch = examples[at : at + batch_size]
                inputs = inputs_of(batch)
                clock.armed = True
                answers = answer_batch(model, processor, inputs, new_tokens)
                for example, answer in zip(batch, answers, strict=True):
                    hits[example.type].append(is_right(answer, example.answer))
                report = pruning.report()
                kept, total = kept + report.kept, total + report.total
                tick(len(batch))
        # The demo VLM says a word and the end; others are counted at the length they may use.
        flops = stage_flops(model, inputs_of(examples[:1])).total(new_tokens=2 if own_model else new_tokens)
    right = sum(sum(h) for h in hits.values())
    return Cell(
        method=method,
        ratio=ratio,
        accuracy=right / len(examples),
        kept=kept / len(examples),
        total=total / len(examples),
        prefill_ms=1e3 * clock.seconds / len(examples),
        flops=flops,
        questions=len(examples),
        correct=right,
        per_type={name: sum(h) / len(h) for name, h in sorted(hits.items())},
        seconds=time.perf_counter() - started,
    )


def ask_at(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    method: str,
    ratio: float,
    new_tokens: int,
    scorer: Any = None,
) -> tuple[str, Any]:
    """One answer about one picture at one setting, and the record of what was kept (a StreamRecord)."""
    with tokprune.apply(model, method, ratio=ratio, processor=processor, scorer=scorer) as pruning:
        inputs = build_inputs(processor, [question], [image], model)
        answer = answer_batch(model, processor, inputs, new_tokens)[0]
        last = pruning.last
    return answer, None if last is None else last.streams[0]
