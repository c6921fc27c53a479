"""Which frames of a video: the uniform rules in use in the field, by name, and sampling by time.

They differ by up to half a segment and in whether the last frame is ever seen, so a result is only comparable when it
names its rule. `total` is the number of frames to choose from (0-based indices), `count` how many are asked for. All
return ascending int64 indices (count,), possibly with repeats where a rule says so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tokprune.errors import OptionError, unknown

Indices = npt.NDArray[np.int64]


def check_counts(total: int, count: int) -> None:
    """Both must be at least 1."""
    if total < 1 or count < 1:
        raise OptionError(f"cannot choose {count} of {total} frames; both must be at least 1.")


def linspace(total: int, count: int) -> Indices:
    """From the first to the last frame, rounded down; repeats frames when count > total (LLaVA-OneVision)."""
    check_counts(total, count)
    return np.linspace(0, total - 1, count).astype(np.int64)


def linspace_unique(total: int, count: int) -> Indices:
    """`linspace` without its repeats: the default of `read_video`. Gives every frame when count >= total."""
    return np.unique(linspace(total, count))


def linspace_rounded(total: int, count: int) -> Indices:
    """`count` points from the first to the last frame, rounded to the nearest, halves to even (Qwen3-VL)."""
    check_counts(total, count)
    return np.linspace(0, total - 1, count).round().astype(np.int64)


def centers(total: int, count: int) -> Indices:
    """The middles of `count` equal segments; repeats frames when count > total (InternVL)."""
    check_counts(total, count)
    segment = (total - 1) / count
    return (segment / 2 + np.round(segment * np.arange(count))).astype(np.int64)


def floor(total: int, count: int) -> Indices:
    """The beginnings of `count` equal segments, floor(i·total/count); never the last frame (Transformers, Qwen2-VL).

    Raises OptionError when count > total, as those do.
    """
    check_counts(total, count)
    if count > total:
        raise OptionError(f"rule 'floor' cannot choose {count} of {total} frames; ask for at most {total}.")
    return np.arange(count, dtype=np.int64) * total // count


def floor_fps(total: int, source_fps: float, fps: float) -> Indices:
    """`floor` with as many frames as the video's length times `fps` gives, at least one (Transformers)."""
    check_rate(source_fps)
    check_rate(fps)
    return floor(total, max(1, int(total / source_fps * fps)))


def every_second(total: int, source_fps: float, most: int | None = None) -> Indices:
    """Every round(source_fps)-th frame; `linspace` to `most` frames when that gives more (LLaVA-Video)."""
    check_counts(total, 1)
    check_rate(source_fps)
    indices = np.arange(0, total, max(1, round(source_fps)), dtype=np.int64)
    return linspace(total, most) if most is not None and len(indices) > most else indices


def longvideobench(total: int, source_fps: float, most: int = 16) -> Indices:
    """i·int(total/K), K = min(most, whole seconds): not to the tail, none below a second (LongVideoBench)."""
    check_counts(total, most)
    check_rate(source_fps)
    count = min(most, int(total / source_fps))
    return np.arange(count, dtype=np.int64) * (total // count if count else 0)


def quota_frames(duration: float, base: int = 96, per_hour: float = 64) -> int:
    """How many frames QuoTA's dynamic sampling takes of `duration` seconds: base + per_hour per hour."""
    return base + int(duration / 3600 * per_hour)


def frames_by_length(rule: str, duration: float) -> int:
    """Frames of so many seconds: "quota" is 96 and 64 more per hour, "quota:64:32" other numbers of these."""
    parts = rule.split(":")
    numbers = [int(p) if p.isdigit() else -1 for p in parts[1:]]
    if parts[0] != "quota" or len(numbers) > 2 or any(n < 0 for n in numbers) or numbers[:1] == [0]:
        raise OptionError(
            f'frames={rule!r}; write how many, such as frames=64, or frames="quota", or frames="quota:96:64".'
        )
    return quota_frames(duration, *numbers)


def at_times(timestamps: npt.NDArray[np.float64], fps: float, start: float, end: float) -> Indices:
    """The frame on screen at start, start + 1/fps, … before `end`: right for constant and variable frame rates.

    timestamps: (N,) ascending seconds. Each frame at most once, so a rate above the video's own gives all frames.
    """
    check_rate(fps)
    ticks = start + np.arange(max(1, int(np.ceil((end - start) * fps - 1e-9)))) / fps
    return np.unique(np.clip(np.searchsorted(timestamps, ticks + TOLERANCE, side="right") - 1, 0, None)).astype(
        np.int64
    )


def check_rate(fps: object) -> float:
    """Return `fps` as a float, or say why it is not a frame rate."""
    if isinstance(fps, bool) or not isinstance(fps, int | float | np.number) or not np.isfinite(fps) or fps <= 0:
        raise OptionError(f"fps={fps!r} is not a rate in frames per second; write a positive number such as fps=1.")
    return float(fps)


TOLERANCE = 1e-6  # seconds: what a time base in float64 may be off by
RULES: dict[str, Callable[[int, int], Indices]] = {
    "linspace": linspace,
    "linspace_unique": linspace_unique,
    "linspace_rounded": linspace_rounded,
    "centers": centers,
    "floor": floor,
}


def rule(name: str) -> Callable[[int, int], Indices]:
    """The counting rule of this name."""
    if name not in RULES:
        raise unknown("sampling rule", name, RULES)
    return RULES[name]
