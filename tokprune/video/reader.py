"""read_video: choose frames by count, rate, time or number, and decode just those."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from tokprune.errors import OptionError, nearest, unknown
from tokprune.files import refuse_url
from tokprune.video import backend_decord, backend_images, backend_pyav, backend_torchcodec, sampling
from tokprune.video.index import Index, PacketIndex, scan_packets
from tokprune.video.job import Job, VideoError
from tokprune.video.picture import Frame, fit
from tokprune.video.result import Video
from tokprune.video.sampling import Indices

BACKENDS = ("auto", "pyav", "torchcodec", "decord")
ON_MISSING = ("drop", "nearest", "raise")
MOST_BYTES = 8 << 30  # of frames; more is nearly always a forgotten frames= or fps=

Decode = Callable[[Any, Sequence[int], Job], Iterator[tuple[int, Frame]]]


def read_video(  # one argument per question that people ask of a video
    path: str | os.PathLike[str],
    frames: int | Sequence[int] | str | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    backend: str = "auto",
    *,
    rule: str = "linspace_unique",
    size: tuple[int, int] | None = None,
    on_missing: str = "drop",
    time_limit: float | None = None,
    image_fps: float = 1.0,
    index: Index | None = None,
) -> Video:
    """Read some frames of a video file, a folder of pictures, or an animated GIF, WebP or PNG.

    frames: how many ("quota": QuoTA's rule, see `sampling.frames_by_length`), spread by `rule` (a name in
    `sampling.RULES`) from the first to the last; or the frames' own numbers, in any order. fps: one frame per 1/fps
    seconds, the one on screen; with both, `rule` takes over where that gives more than `frames`. Neither: every frame.
    start, end: seconds since the first frame; the frames on screen in [start, end).
    backend: "auto" (PyAV), "pyav", "torchcodec" or "decord". size: (height, width) to scale each frame to as it is
    decoded. on_missing: what becomes of chosen frames that cannot be decoded: "drop" leaves them out, "nearest" repeats
    the nearest decoded one under that one's index and time, "raise" is an error; the first two warn.
    time_limit: seconds of decoding; decord, which can hang, has 120 unless told otherwise. image_fps: rate of a folder.
    index: what `scan(path)` returned, to read one file several times.

    Memory: the frames returned, one batch of a backend, and some numbers per frame of the file. Raises OptionError for
    arguments that cannot be used, VideoError for files that are no video or cannot be decoded at all, MissingExtraError
    for a backend that is not installed.
    """
    if backend not in BACKENDS:
        raise unknown("video backend", backend, BACKENDS)
    if on_missing not in ON_MISSING:
        raise unknown("on_missing", on_missing, ON_MISSING)
    if time_limit is not None and not positive(time_limit):
        raise OptionError(
            f"time_limit={time_limit!r} is not a number of seconds; write such as time_limit=60, or None."
        )
    check_size(size)
    sampling.rule(rule)
    check_request(frames, fps, start, end)
    source = locate(path)
    index = scan(source, image_fps=image_fps) if index is None else index
    if index.path != source:
        raise OptionError(f"index= belongs to {index.path}, not to {source}; give the scan() of the same path.")
    notes: list[str] = []
    chosen, named = choose(index, frames, fps, start, end, rule, notes)
    name, reason, decode = pick_backend(index, backend)
    shape = size or index.size
    check_memory(len(chosen), shape)
    job = Job(time_limit)
    decoded = Decoded.of(index, chosen, shape, decode, job, notes)
    indices, missing = decoded.settle(chosen, on_missing, source, job, notes)
    return Video(
        frames=decoded.frames,
        timestamps=index.timestamps[indices],
        indices=indices,
        total=index.total,
        fps=index.fps,
        duration=index.duration,
        size=index.size,
        path=source,
        backend=name,
        reason=reason,
        rule=named,
        missing=missing,
        warnings=(*index.warnings, *notes),
    )


@dataclass
class Decoded:
    """The chosen frames as they were decoded."""

    frames: Frame
    """(n, H, W, 3) uint8, one place per chosen frame; what could not be decoded is not filled."""
    slots: dict[int, list[int]]
    """Places of each frame number among the chosen ones."""
    got: set[int]
    """Numbers of the frames that were decoded."""

    @staticmethod
    def of(
        index: Index, chosen: Indices, shape: tuple[int, int], decode: Decode, job: Job, notes: list[str]
    ) -> Decoded:
        """Decode the chosen frames, scaled to `shape` (height, width)."""
        height, width = shape
        out = np.empty((len(chosen), height, width, 3), np.uint8)
        wanted, slot = np.unique(chosen, return_inverse=True)
        slots: dict[int, list[int]] = {}
        for place, number in enumerate(slot.tolist()):
            slots.setdefault(int(wanted[number]), []).append(place)
        got: set[int] = set()
        scaled = False
        for i, frame in decode(index, wanted.tolist(), job):
            scaled |= frame.shape[:2] != index.size
            out[slots[i]] = fit(frame, (height, width))
            got.add(i)
        notes += summary(job.notes)
        if scaled:
            notes.append(f"the picture size changes within the video; all frames were scaled to {height}×{width}")
        if job.damaged:
            notes.append(f"{len(set(job.damaged))} frames were decoded with errors: {listed(sorted(set(job.damaged)))}")
        return Decoded(out, slots, got)

    def settle(
        self, chosen: Indices, on_missing: str, source: Path, job: Job, notes: list[str]
    ) -> tuple[Indices, tuple[int, ...]]:
        """Drop, repeat or refuse what could not be decoded; the frame number at each place, and the missing ones."""
        missing = tuple(i for i in sorted(self.slots) if i not in self.got)
        if not missing:
            return chosen, missing
        what = f"{len(missing)} of {len(self.slots)} chosen frames cannot be decoded: {listed(missing)}"
        if not self.got:
            raise VideoError(f"{source}: {what}{''.join(f'; {n}' for n in summary(job.notes))}.")
        if on_missing == "raise":
            raise VideoError(
                f"{source}: {what}. on_missing='drop' leaves them out, 'nearest' repeats their neighbours."
            )
        if on_missing == "drop":
            stay = ~np.isin(chosen, missing)
            self.frames = self.frames[stay]
            notes.append(f"{what}; they were left out")
            return chosen[stay], missing
        have = np.asarray(sorted(self.got), np.int64)
        indices = chosen.copy()
        for i in missing:
            near = int(have[np.abs(have - i).argmin()])
            for place in self.slots[i]:
                self.frames[place], indices[place] = self.frames[self.slots[near][0]], near
        notes.append(f"{what}; the nearest decoded ones stand in their place")
        return indices, missing


def check_memory(count: int, shape: tuple[int, int]) -> None:
    """Refuse more frames than anyone wants in memory; nearly always a forgotten frames= or fps=."""
    height, width = shape
    if (need := count * height * width * 3) > MOST_BYTES:
        raise OptionError(
            f"{count} frames of {height}×{width} are {need / 2**30:.0f} GiB. Ask for fewer with frames= or fps=, or "
            "for smaller ones with size=(height, width)."
        )


def scan(path: str | os.PathLike[str], *, image_fps: float = 1.0) -> Index:
    """What a video holds, without decoding it: number of frames, their times, size. `read_video(index=…)` takes it.

    Raises as `read_video` does.
    """
    source = locate(path)
    if source.is_dir():
        return backend_images.scan_folder(source, sampling.check_rate(image_fps))
    if backend_images.is_picture(source):
        return backend_images.scan_animation(source)
    return scan_packets(source)


def locate(path: str | os.PathLike[str]) -> Path:
    """The local file or folder meant by `path`, or the error that says what to give instead."""
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"path is a {type(path).__name__}; give the path of a video file or of a folder of pictures.")
    text = os.fspath(path)
    if not isinstance(text, str):
        text = os.fsdecode(text)
    refuse_url(text)
    file = Path(text).expanduser()
    if not text or not file.exists():
        folder = file.parent
        near = text and folder.is_dir()
        close = nearest(file.name, [p.name for p in folder.iterdir()][:10_000]) if near else ""
        raise OptionError(f"there is no file {text!r}.{close}")
    if not file.is_dir() and not file.is_file():
        raise OptionError(
            f"{text!r} is neither a file nor a folder (a pipe or device?); save the video to a file first."
        )
    return file.resolve()


def pick_backend(index: Index, backend: str) -> tuple[str, str, Decode]:
    """Name, reason and decode function. "auto" never picks decord, and torchcodec only by name."""
    if isinstance(index, PacketIndex):
        if backend == "torchcodec":
            return backend, "asked for", backend_torchcodec.decode
        if backend == "decord":
            return backend, "asked for; run in a process of its own with a time limit", backend_decord.decode
        reason = (
            "asked for" if backend == "pyav" else "auto: exact in every container, by an index of the file's packets"
        )
        if index.hidden and backend == "auto":
            reason += f"; honours the edit list, which hides {index.hidden} frames and misleads decord"
        return "pyav", reason, backend_pyav.decode
    folder = isinstance(index, backend_images.FolderIndex)
    what = "a folder of pictures" if folder else "an animated picture"
    if backend != "auto":
        raise OptionError(f"backend={backend!r} reads video files; {index.path} is {what}. Write backend='auto'.")
    return "pillow", f"auto: {what}", backend_images.decode_folder if folder else backend_images.decode_animation


def choose(
    index: Index,
    frames: int | Sequence[int] | str | None,
    fps: float | None,
    start: float | None,
    end: float | None,
    rule: str,
    notes: list[str],
) -> tuple[Indices, str]:
    """Numbers of the frames to decode, and the name of how they were chosen."""
    first, last = window(index, start, end, notes)
    if isinstance(frames, str):
        shown = (min(index.duration, end or index.duration)) - (start or 0.0)
        frames = min(sampling.frames_by_length(frames, shown), last - first)
    if frames is not None and not isinstance(frames, int | np.integer):
        chosen = np.asarray([int(i) for i in frames], np.int64)
        if (wrong := chosen[(chosen < 0) | (chosen >= index.total)]).size:
            raise OptionError(f"frames names {wrong[0]}; {index.path} has frames 0 to {index.total - 1}.")
        return chosen, "indices"
    count = None if frames is None else int(frames)
    if fps is not None:
        begin, stop = start or 0.0, min(index.duration if end is None else end, index.duration)
        chosen = sampling.at_times(index.timestamps, float(fps), begin, stop)
        if count is None or len(chosen) <= count:
            if fps > index.fps * 1.001:
                notes.append(f"fps={fps:g} is above the video's own {index.fps:.4g}; each frame is there once")
            return chosen, f"fps={fps:g}"
    if count is None:
        return np.arange(first, last, dtype=np.int64), "all"
    chosen = first + sampling.rule(rule)(last - first, count)
    if count > last - first:
        notes.append(f"{count} frames were asked for and there are {last - first}; the result has {len(chosen)}")
    return chosen, rule


def window(index: Index, start: float | None, end: float | None, notes: list[str]) -> tuple[int, int]:
    """First and one past the last frame on screen in [start, end)."""
    times, off = index.timestamps, sampling.TOLERANCE
    if start is not None and start >= index.duration:
        raise OptionError(f"start={start:g} lies behind the end of {index.path}, which lasts {index.duration:.2f} s.")
    if end is not None and end > index.duration + 0.5 / index.fps + off:
        notes.append(f"end={end:g} lies behind the end of the video, which lasts {index.duration:.2f} s")
    first = 0 if start is None else int(np.searchsorted(times, start + off, side="right")) - 1
    last = index.total if end is None else int(np.searchsorted(times, end - off, side="left"))
    return max(first, 0), max(last, first + 1, 1)


def check_request(frames: object, fps: object, start: object, end: object) -> None:
    """Raise OptionError for values that mean nothing, before a file is touched."""
    if isinstance(frames, str):
        sampling.frames_by_length(frames, 0.0)
    elif isinstance(frames, int | np.integer) and not isinstance(frames, bool):
        if int(frames) < 1:
            raise OptionError(f"frames={frames!r} is no number of frames; the smallest is 1.")
    elif frames is not None:
        listing = isinstance(frames, Sequence | np.ndarray) and not isinstance(frames, str | bytes)
        if not listing or not all(isinstance(i, Integral) for i in frames):  # type: ignore[attr-defined]
            raise OptionError(f"frames={frames!r}; write how many (frames=64) or which ones (frames=[0, 30, 60]).")
        if not len(frames):  # type: ignore[arg-type]
            raise OptionError(
                "frames=[] names no frame; write how many (frames=64) or which ones (frames=[0, 30, 60])."
            )
        if fps is not None or start is not None or end is not None:
            raise OptionError("frames= names the frames already; leave out fps=, start= and end=.")
    if fps is not None:
        sampling.check_rate(fps)
    for name, value in (("start", start), ("end", end)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < np.inf
        ):
            raise OptionError(f"{name}={value!r} is no time; write seconds since the first frame, such as {name}=12.5.")
    if start is not None and end is not None and end <= start:  # type: ignore[operator]
        raise OptionError(f"end={end!r} must be greater than start={start!r} (both in seconds).")


def check_size(size: object) -> None:
    """Raise OptionError unless `size` is None or (height, width)."""
    if size is not None and not (
        isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(n, Integral) and int(n) > 0 for n in size)
    ):
        raise OptionError(f"size={size!r}; write (height, width) in pixels, such as size=(384, 384).")


def positive(value: object) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < float("inf")


def listed(numbers: Sequence[int]) -> str:
    """Up to eight numbers, then how many more."""
    text = ", ".join(str(n) for n in numbers[:8])
    return text + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def summary(notes: Sequence[str]) -> list[str]:
    """The first note and how many more there are: a broken file says the same hundreds of times."""
    return list(notes[:1]) + ([f"{len(notes) - 1} more messages of this kind"] if len(notes) > 1 else [])
