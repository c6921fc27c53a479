"""Asks one model the same questions at several keep ratios and methods: the demo's table, in numbers."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tokprune.profiling.flops import stage_flops
from tokprune.profiling.stages import find_stages, watch
from tokprune.profiling.timing import synchronize

from .asking import Asker, batch_size, source
from .clips import ClipExample
from .scenes import Example

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SettingResult:
    """What one method did at one keep ratio."""

    method: str
    ratio: float
    accuracy: float  # share answered right
    kept: float  # visual tokens per question, mean
    total: float  # of so many
    prefill_ms: float  # of the LLM, per question
    flops: int  # of one answer, pixels to last token, counted by torch (at the longest answer the model may give)
    questions: int
    correct: int
    per_type: dict[str, float]  # accuracy by type of question
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def plan_cells(methods: Sequence[str], ratios: Sequence[float]) -> list[tuple[str, float]]:
    """The (method, ratio) settings of a sweep; `none` ignores the ratio and runs once, as the baseline."""
    cells = [("none", 1.0)] if "none" in methods else []
    return cells + [(m, r) for m in methods if m != "none" for r in sorted(ratios, reverse=True)]


def near_tenth(ratios: Sequence[float]) -> float:
    """The ratio nearest to 10 %, at which pictures are drawn."""
    return min(ratios, key=lambda r: abs(r - 0.1))


def one_of_each_type(examples: Sequence[Example | ClipExample]) -> list[Example | ClipExample]:
    """The first question of each type that is about another picture or clip than those before."""
    chosen: list[Example | ClipExample] = []
    for example in examples:
        if example.type not in {e.type for e in chosen} and source(example) not in map(source, chosen):
            chosen.append(example)
    return chosen


def is_right(answer: str, expected: str) -> bool:
    """Whether the first word of a free answer is the expected one."""
    words = re.findall(r"[a-z0-9-]+", answer.lower())
    return bool(words) and words[0] == expected.lower()


class _PrefillClock:
    """Adds up the time of the first call of the LLM in each generate()."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.start, self.armed = device, 0.0, 0.0, False

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def enter(self, part: str) -> None:
        if part == "language" and self.armed:
            self.start = self._now()

    def leave(self, part: str) -> None:
        if part == "language" and self.armed:
            self.seconds += self._now() - self.start
            self.armed = False


def run_cell(
    asker: Asker,
    examples: Sequence[Example | ClipExample],
    method: str,
    ratio: float,
    tick: Callable[[int], None] = lambda done: None,
) -> SettingResult:
    """Ask all examples at one setting; the model is given back as it was. tick: called with the questions done."""
    hits: dict[str, list[bool]] = defaultdict(list)
    kept = total = 0
    started = time.perf_counter()
    size = batch_size(examples)
    clock = _PrefillClock(asker.model.device)
    with asker.pruned(method.split("+"), ratio) as pruning:
        with watch(find_stages(asker.model), clock.enter, clock.leave):
            for at in range(0, len(examples), size):
                batch = examples[at : at + size]
                inputs = asker.inputs(batch)
                clock.armed = True
                for example, answer in zip(batch, asker.answers(inputs), strict=True):
                    hits[example.type].append(is_right(answer, example.answer))
                report = pruning.report()
                kept, total = kept + report.kept, total + report.total
                tick(len(batch))
        # The demo VLM says a word and the end; others are counted at the length they may use.
        new_tokens = 2 if asker.embedded else asker.new_tokens
        flops = stage_flops(asker.model, asker.inputs(examples[:1])).total(new_tokens=new_tokens)
    right, count = sum(sum(h) for h in hits.values()), len(examples)
    return SettingResult(
        method=method,
        ratio=ratio,
        accuracy=right / count,
        kept=kept / count,
        total=total / count,
        prefill_ms=1e3 * clock.seconds / count,
        flops=flops,
        questions=count,
        correct=right,
        per_type={name: sum(h) / len(h) for name, h in sorted(hits.items())},
        seconds=time.perf_counter() - started,
    )
