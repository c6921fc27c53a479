"""Asks the clip model the same questions about real mp4 files at several keep ratios and methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokprune
from tokprune.demo.clips import ClipExample
from tokprune.demo.clips_evaluation import clip_inputs, generate_words
from tokprune.demo.sweep import Cell, ask_all
from tokprune.video import Video, read_video

BATCH = {8: 8, 32: 4}  # questions at once, by frames: about as many visual tokens


class ClipReader:
    """Evenly spread frames of files, each decoded once."""

    def __init__(self) -> None:
        self._read = lru_cache(maxsize=256)(lambda path, frames: read_video(path, frames=frames))

    def __call__(self, path: Path, frames: int) -> Video:
        """The frames of one file."""
        return self._read(path, frames)


def run_clip_cell(
    model: Any,
    processor: Any,
    examples: Sequence[ClipExample],
    reader: ClipReader,
    method: str,
    ratio: float,
    *,
    scorer: Any = None,
    tick: Callable[[int], None] = lambda done: None,
) -> Cell:
    """Ask all examples at one setting; the model is given back as it was."""

    def inputs_of(batch: Sequence[ClipExample]) -> Any:
        videos = [reader(e.path, e.frames).frames for e in batch]
        return clip_inputs(model, processor, [e.question for e in batch], videos)

    return ask_all(
        model,
        processor,
        examples,
        inputs_of,
        method,
        ratio,
        batch_size=BATCH[examples[0].frames],
        own_model=True,
        scorer=scorer,
        tick=tick,
    )


def ask_clip_at(
    model: Any, processor: Any, video: Video, question: str, method: str, ratio: float, scorer: Any = None
) -> tuple[str, Any]:
    """One answer about one clip at one setting, and the record of what was kept (a StreamRecord)."""
    with tokprune.apply(model, method, ratio=ratio, processor=processor, scorer=scorer) as pruning:
        answer = generate_words(model, processor, clip_inputs(model, processor, [question], [video.frames]))[0]
        last = pruning.last
    return answer, None if last is None else last.streams[0]
