"""What `tokprune run` does before the model: reading videos, and choosing frames of them by a cheap scorer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokprune.errors import OptionError, unknown
from tokprune.types import JsonObject, Processor

if TYPE_CHECKING:
    from tokprune.video import Video
    from tokprune.video.index import Index

FRAMES = 16  # read of a video when nothing is said
SCORED = ("aks", "quota", "wfs_sb")  # rules of --select that read scores
FEATURED = ("scenetilling", "wfs_sb")  # … and that read picture embeddings
CANDIDATES = 4  # times as many as are wanted, where one a second gives fewer than wanted
SMALL = 256  # pixels of the shorter side of candidate frames


@dataclass(frozen=True)
class Reading:
    """Which frames of a file are wanted. select: rule and number of frames, chosen before the encoder."""

    frames: int | str | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    backend: str = "auto"
    rule: str = "linspace_unique"
    select: tuple[str, int] | None = None


@dataclass(frozen=True)
class VideoRead:
    """A video as read. seconds: decoding; select_seconds: scoring candidates. how: of the candidates, if any."""

    video: Video
    seconds: float
    select_seconds: float = 0.0
    how: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain data, without the frames."""
        v = self.video
        return {
            "path": str(v.path),
            "frames": v.indices.tolist(),
            "timestamps": v.timestamps.tolist(),
            "total": v.total,
            "rule": self.how or v.rule,
            "backend": v.backend,
            "reason": v.reason,
            "read_seconds": self.seconds,
            "select_seconds": self.select_seconds,
            "warnings": list(v.warnings),
        }

    def __str__(self) -> str:
        v = self.video
        height, width = v.size
        spans = f"{v.timestamps[0]:.1f} to {v.timestamps[-1]:.1f} s" if len(v) else "no frames"
        text = (
            f"{v.path.name}: {len(v)} of {v.total} frames ({spans} of {v.duration:.1f} "
            f"s, {height}×{width}, {v.fps:.4g} fps), rule {self.how or v.rule}, {v.backend} "
            f"({v.reason}), {self.seconds:.2f} s"
        )
        if self.select_seconds:
            text += f" and {self.select_seconds:.2f} s to choose"
        return "\n".join([text, *(f"  warning: {w}" for w in v.warnings)])


def parse_frames(text: str | None) -> int | str | None:
    """A number of frames, or a rule that goes by the video's length."""
    if text is None or not text.strip().lstrip("-").isdigit():
        if text is not None:
            from tokprune.video.sampling import frames_by_length

            frames_by_length(text, 0.0)
        return text
    return int(text)


def parse_select(text: str | None) -> tuple[str, int] | None:
    """ "aks:16" as rule and number."""
    if text is None:
        return None
    from tokprune.video.select import SELECTORS

    name, _, count = text.partition(":")
    key = name.strip().lower().replace("-", "_")
    if key not in SELECTORS:
        raise unknown("rule of --select", name, SELECTORS)
    if not count.strip().isdigit() or int(count) < 1:
        raise OptionError(f"--select {text!r} needs a number of frames: --select {key}:16")
    return key, int(count)


def read_frames(index: Index, reading: Reading, question: str, scorer: object, processor: Processor) -> VideoRead:
    """The wanted frames of one file. index: of `scan`."""
    from tokprune.video import read_video

    began = time.perf_counter()
    window: JsonObject = {"start": reading.start, "end": reading.end, "backend": reading.backend, "index": index}
    if reading.select is not None:
        return _selected(index, reading, question, scorer, processor, window)
    count = FRAMES if reading.frames is None and reading.fps is None else reading.frames
    video = read_video(index.path, frames=count, fps=reading.fps, rule=reading.rule, **window)
    return VideoRead(video, time.perf_counter() - began)


def _selected(
    index: Index, reading: Reading, question: str, scorer: object, processor: Processor, window: JsonObject
) -> VideoRead:
    """Candidates small, scored and chosen from; then the chosen frames in full."""
    from tokprune.runtime.frames.relevance import embed_frames, frame_relevance
    from tokprune.video import read_video
    from tokprune.video.select import select_frames

    if reading.select is None:
        raise OptionError("no rule to select frames by.")
    name, count = reading.select
    if scorer is None and name in (*SCORED, *FEATURED):
        raise OptionError(
            f"--select {name} looks at the frames with a text-image scorer: add --scorer "
            f"open_clip:ViT-B-32/laion2b_s34b_b79k, or take uniform_frames or fps_frames."
        )
    began = time.perf_counter()
    short = min(index.size)
    height, width = (n if short <= SMALL else max(1, round(n * SMALL / short)) for n in index.size)
    size, fps = (height, width), reading.fps or 1.0
    candidates = read_video(index.path, size=size, fps=fps, **window)
    rate = f"{fps:g} a second"
    if len(candidates) < count:
        candidates = read_video(index.path, size=size, frames=count * CANDIDATES, **window)
        rate = "evenly spaced"
    read_seconds = time.perf_counter() - began
    began = time.perf_counter()
    wanted = min(count, len(candidates))
    facts: JsonObject = {}
    if name in (*SCORED, *FEATURED):
        features = embed_frames(candidates.frames, scorer, processor)
        if name in SCORED:
            facts["scores"] = frame_relevance(features, question, scorer)
        if name in FEATURED:
            facts["features"] = features
    else:
        facts["timestamps"] = candidates.timestamps.tolist()
    chosen = select_frames(name, wanted, **facts)
    select_seconds = time.perf_counter() - began
    began = time.perf_counter()
    numbers: Sequence[int] = candidates.indices[chosen].tolist()
    video = read_video(index.path, frames=numbers, index=index, backend=reading.backend)
    how = f"{name}, {len(chosen)} of {len(candidates)} candidates ({rate})"
    return VideoRead(video, read_seconds + time.perf_counter() - began, select_seconds, how)
