"""Asks the demo VLM for clips the same questions at many settings, quickly: what does not depend on the setting is done
once.

Used by video_qa.py and query_vs_uniform.py. Frames are decoded and processed once for all settings; the features of a
batch of clips and the scorer's view of its frames are remembered, except for methods that watch the vision tower work.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import tokprune
import tokprune.evaluation
from tokprune.demo.asking import Asker
from tokprune.demo.clips import LONG_FRAMES, ClipExample
from tokprune.demo.sweep import is_right
from tokprune.evaluation.significance import compare, holm
from tokprune.methods.base import Method
from tokprune.profiling.flops import stage_flops
from tokprune.video import read_video

SIGNALS_BESIDE_THE_TOWER = ("frame_scores", "clip_text")


@dataclass(frozen=True)
class Setting:
    """One method at one ratio or budget. label: what tables call it. stages: for `tokprune.apply`."""

    label: str
    stages: tuple[str | Method, ...]
    ratio: float | None = None
    budget: int | None = None


@dataclass
class Cell:
    """What came of a setting. kept, total: visual tokens per question. hits: 1 or 0 per question. gflops: of one
    answer."""

    method: str
    ratio: float
    budget: int | None
    accuracy: float = 0.0
    low: float = 0.0
    high: float = 0.0
    kept: float = 0.0
    total: float = 0.0
    gflops: float = 0.0
    questions: int = 0
    per_type: dict[str, float] = field(default_factory=dict)
    hits: list[int] = field(default_factory=list)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def packaged_clips() -> list[ClipExample]:
    """The questions of the offline task tokprune_clips, or none where the package has no task data."""
    folder = Path(next(iter(tokprune.evaluation.__path__))) / "tasks" / "tokprune_clips"
    if not (folder / "questions.jsonl").is_file():
        return []
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        ClipExample(
            folder / "clips" / row["video"],
            row["question"],
            row["answer"],
            row["type"],
            row["scenes"],
            tuple(row["moment"]) if row["moment"] else None,
            row["frames"],
        )
        for row in rows
        if row["video"]
    ]


def balanced(examples: Sequence[ClipExample], questions: int) -> list[ClipExample]:
    """The first `questions` in turn over the types, so that each has as many as the others."""
    of_type: dict[str, list[ClipExample]] = defaultdict(list)
    for example in examples:
        of_type[example.type].append(example)
    out: list[ClipExample] = []
    for turn in range(max(map(len, of_type.values()), default=0)):
        out += [members[turn] for members in of_type.values() if turn < len(members)]
    return out[:questions]


class Remembering:
    """A scorer that embeds each batch of frames once."""

    def __init__(self, scorer: Any) -> None:
        self.scorer, self.seen = scorer, dict[str, Tensor]()

    def embed_image(self, pixels: Tensor) -> Tensor:
        key = digest(pixels)
        if key not in self.seen:
            self.seen[key] = self.scorer.embed_image(pixels)
        return self.seen[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scorer, name)


def digest(pixels: Tensor) -> str:
    """A name for what a tensor holds."""
    return hashlib.sha1(pixels.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


class Clips:
    """The demo VLM for clips with prepared questions."""

    def __init__(self, examples: Sequence[ClipExample], batch: int | None = None) -> None:
        self.model, self.processor = tokprune.demo.load_clips()
        self.asker = Asker(self.model, self.processor)
        self.scorer = Remembering(tokprune.demo.load_scorer())
        self.examples = list(examples)
        self.features: dict[str, Any] = {}
        read = functools.lru_cache(maxsize=64)(lambda path, frames: read_video(path, frames=frames).frames)
        size = batch or (4 if examples[0].frames == LONG_FRAMES else 8)
        self.batches = []
        for at in range(0, len(self.examples), size):
            part = self.examples[at : at + size]
            videos = [read(e.path, e.frames) for e in part]
            self.batches.append((part, self.asker.prepare([e.question for e in part], videos)))
        first = self.examples[0]
        self.one = self.asker.prepare([first.question], [read(first.path, first.frames)])

    @contextlib.contextmanager
    def remembered(self, on: bool) -> Iterator[None]:
        """Encode each batch of clips once over all settings, while `on`."""
        base = self.model.base_model
        original = base.get_video_features

        @functools.wraps(original)
        def recall(*args: Any, **kwargs: Any) -> Any:
            key = digest(args[0] if args else next(v for k, v in kwargs.items() if k.startswith("pixel_values")))
            if key not in self.features:
                self.features[key] = original(*args, **kwargs)
            return copy.copy(self.features[key])

        if on:
            base.get_video_features = recall
        try:
            yield
        finally:
            base.__dict__.pop("get_video_features", None)

    def ask(self, setting: Setting, cost: bool = False) -> Cell:
        """All questions at one setting. cost: count the FLOPs of one answer, too."""
        if not setting.stages:
            return self._ask(setting, "random", True, cost, ratio=1.0)
        methods = [tokprune.get_method(m) if isinstance(m, str) else m for m in setting.stages]
        watched = any(m.stage == "encoder" for m in methods) or any(
            need not in SIGNALS_BESIDE_THE_TOWER for m in methods for need in getattr(m, "needs", ())
        )
        return self._ask(setting, methods, not watched, cost, ratio=setting.ratio, budget=setting.budget)

    def _ask(self, setting: Setting, stages: Any, remember: bool, cost: bool, **amount: Any) -> Cell:
        cell = Cell(setting.label, 1.0 if setting.ratio is None else setting.ratio, setting.budget)
        hits: list[int] = []
        more = {"processor": self.processor, "scorer": self.scorer, **amount}
        with self.remembered(remember), tokprune.apply(self.model, stages, **more) as pruning:
            for part, inputs in self.batches:
                said = self.asker.answers(inputs)
                hits += [int(is_right(word, e.answer)) for word, e in zip(said, part, strict=True)]
                report = pruning.report()
                cell.kept, cell.total = cell.kept + report.kept, cell.total + report.total
        if cost:
            with tokprune.apply(self.model, stages, **{**more, "scorer": self.scorer.scorer}):  # nothing remembered
                cell.gflops = stage_flops(self.model, self.one).total(new_tokens=2) / 1e9
        n = len(hits)
        cell.kept, cell.total = cell.kept / n, cell.total / n
        if setting.ratio is None and cell.total:
            cell.ratio = cell.kept / cell.total
        cell.hits, cell.questions, cell.accuracy = hits, n, sum(hits) / n
        cell.low, cell.high = wilson(sum(hits), n)
        of_type: dict[str, list[int]] = defaultdict(list)
        for example, hit in zip(self.examples, hits, strict=True):
            of_type[example.type].append(hit)
        cell.per_type = {name: sum(h) / len(h) for name, h in sorted(of_type.items())}
        return cell


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score method."""
    p, scale = right / n, 1 + z * z / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def paired(base: Cell, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each cell against `base` over the same questions, with p values corrected for how many are compared (Holm)."""
    found = [compare(as_scores(base), as_scores(cell)) for cell in cells]
    return [
        {
            "method": cell.method,
            "against": base.method,
            "ratio": cell.ratio,
            "budget": cell.budget,
            "difference": pair.difference,
            "low": pair.low,
            "high": pair.high,
            "p": pair.p,
            "p_holm": corrected,
            "better": pair.better,
            "worse": pair.worse,
        }
        for cell, pair, corrected in zip(cells, found, holm([pair.p for pair in found]), strict=True)
    ]


def as_scores(cell: Cell) -> Mapping[Any, float]:
    """Question number to score."""
    return dict(enumerate(map(float, cell.hits)))
