"""Which frames to encode: the frames stage's rules, asked before the encoder has seen any.

index = scan("film.mp4")                                   # thousands of frames, none kept in memory
frames = select_frames("aks", 64, scores=clip_scores)      # clip_scores: one number per candidate frame
video = read_video("film.mp4", frames=[candidates[i] for i in frames])
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tokprune.errors import OptionError, nearest, unknown
from tokprune.ops.frames import frames_of_scenes, scenes
from tokprune.ops.keyframes import WEIGHTS, aks, aks_published, best_first, check_count, middles, wfs_sb
from tokprune.video.sampling import at_times, rule

if TYPE_CHECKING:
    from tokprune.methods.base import Method

Numbers = npt.ArrayLike | torch.Tensor
T = TypeVar("T")


def even_frames(total: int, count: int, by: str = "middles") -> list[int]:
    """`count` different frames of `total`, evenly spaced, ascending.

    by: "middles" of equal segments, floor((i + 0.5) total / count), or a rule of `video.sampling`; where that repeats
    frames ("centers", nearly all asked for), it is the middles too.
    """
    frames: list[int] = [] if by == "middles" else sorted(set(rule(by)(total, count).tolist()))
    return frames if len(frames) == count else middles(total, count)


def frames_by_time(timestamps: Sequence[float], fps: float) -> list[int]:
    """The frames on screen at `fps` ticks a second, ascending; the last one stays as long as frames usually do."""
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise OptionError("timestamps are not ascending seconds, one per frame.")
    stay = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return [int(i) for i in at_times(times, fps, float(times[0]), float(times[-1]) + stay)]


def select_frames(
    method: str | Method,
    count: int,
    scores: Numbers | None = None,
    features: Numbers | None = None,
    timestamps: Sequence[float] | None = None,
    total: int | None = None,
    **options: object,
) -> list[int]:
    """Choose exactly `count` different frames of a video by a method of the frames stage. Returns them ascending.

    What is published may choose fewer.

    method: a name, such as "aks", or a method object, whose settings are taken over (scorers aside: the scores are
    given here). scores: (T,), higher = relevant, for "aks", "wfs_sb" and "quota" (the best `count`); NaN and infinite
    ones count as the worst. features: (T, C), one vector per frame, for "scenetilling", and for "wfs_sb" what frames
    are compared by. timestamps: (T,) seconds, for "fps_frames". total: T, where none of these is given. options: the
    method's fields. Linear in T up to sorting, so hours of candidate frames are fine.
    """
    if isinstance(method, str):
        name, settings = method, options
    elif dataclasses.is_dataclass(method) and hasattr(method, "info"):
        name, settings = method.info.name, {**vars(method), **options}
    else:
        raise OptionError(f"method is a name, such as 'aks', or a method of the frames stage, not {method!r}.")
    if name not in SELECTORS:
        raise unknown("frames method", name, SELECTORS)
    selector = SELECTORS[name]
    known = inspect.signature(selector).parameters
    for option in options:
        if option not in known or option in ("data", "count"):
            allowed = sorted(set(known) - {"data", "count"})
            raise OptionError(
                f"frame selection by {name!r} has no option {option!r}.{nearest(option, allowed)} Its options: "
                f"{', '.join(allowed) or 'none'}."
            )
    data = _Data(name, scores, features, timestamps, total)
    check_count(count, data.total)
    return selector(data, count, **{k: v for k, v in settings.items() if k in known})


class _Data:
    """What is known of the frames, checked."""

    def __init__(
        self,
        name: str,
        scores: Numbers | None,
        features: Numbers | None,
        timestamps: Sequence[float] | None,
        total: int | None,
    ):
        self.name = name
        self._scores = None if scores is None else torch.as_tensor(scores).detach().double().cpu().reshape(-1)
        self._features = None if features is None else torch.as_tensor(features).detach().cpu()
        if self._features is not None and self._features.dim() != 2:
            raise OptionError(f"features have shape {tuple(self._features.shape)}; write (T, C), one vector per frame.")
        self._timestamps = timestamps
        known = {"scores": self._scores, "features": self._features, "timestamps": timestamps}
        lengths = {what: len(value) for what, value in known.items() if value is not None}  # type: ignore[arg-type]
        if total is not None:
            lengths["total"] = total
        if not lengths:
            raise OptionError("give scores=, features=, timestamps= or total=, so that the number of frames is known.")
        if len(set(lengths.values())) != 1:
            counts = ", ".join(f"{n} by {what}" for what, n in lengths.items())
            raise OptionError(f"the number of frames is not clear ({counts}).")
        self.total = next(iter(lengths.values()))

    def scores(self) -> list[float]:
        """The scores, finite."""
        values = self._need("scores", self._scores, "one number per frame").tolist()
        worst = min(filter(math.isfinite, values), default=0.0)
        return [v if math.isfinite(v) else worst for v in values]

    def features(self) -> torch.Tensor:
        """The features, (T, C)."""
        vectors = self._need("features", self._features, "one vector per frame")
        if not torch.isfinite(vectors).all():
            raise OptionError("features hold NaN or infinity.")
        return vectors

    def optional_features(self) -> npt.NDArray[np.float64] | None:
        """The features as an array, if there are any."""
        return None if self._features is None else self.features().double().numpy()

    def timestamps(self) -> Sequence[float]:
        """Seconds of each frame."""
        return self._need("timestamps", self._timestamps, "seconds of each frame")

    def _need(self, what: str, value: T | None, meaning: str) -> T:
        if value is None:
            raise OptionError(f"frame selection by {self.name!r} needs {what}=: {meaning}.")
        return value


def _uniform(data: _Data, count: int, rule: str = "middles") -> list[int]:
    return even_frames(data.total, count, rule)


def _fps(data: _Data, count: int, fps: float = 1.0) -> list[int]:
    on = frames_by_time(data.timestamps(), fps)
    if len(on) >= count:
        return [on[i] for i in middles(len(on), count)]
    chosen = set(on)
    rest = [i for i in range(data.total) if i not in chosen]
    return sorted([*on, *(rest[i] for i in middles(len(rest), count - len(on)))])


def _quota(data: _Data, count: int) -> list[int]:
    scores = data.scores()
    return sorted(best_first(range(data.total), scores)[:count])


def _aks(data: _Data, count: int, threshold: float = 0.8, depth: int = 5, compat: str = "corrected") -> list[int]:
    choose = aks_published if compat == "published" else aks
    return choose(data.scores(), count, threshold, depth)


def _wfs_sb(
    data: _Data, count: int, weights: Sequence[float] = WEIGHTS, strictness: float = 1.2, balance: float = 0.5
) -> list[int]:
    return wfs_sb(data.scores(), count, data.optional_features(), weights, strictness, balance)


def _scenetilling(
    data: _Data, count: int, alpha: float = 0.5, most: int = 15, boundaries: int | None = None
) -> list[int]:
    return frames_of_scenes(scenes(data.features(), alpha, most, boundaries), count)


SELECTORS: dict[str, Callable[..., list[int]]] = {
    "uniform_frames": _uniform,
    "fps_frames": _fps,
    "quota": _quota,
    "aks": _aks,
    "wfs_sb": _wfs_sb,
    "scenetilling": _scenetilling,
}
