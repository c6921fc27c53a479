"""The index of a video file: which frames it shows, when, and from which key frame each can be decoded.

One pass over the packets, without decoding more than the first frame. The file's own claims (frame count, average rate)
are not used: they are missing in MKV, wrong after cuts, and an average says nothing where the rate varies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from tokprune.errors import missing_extra
from tokprune.types import JsonObject
from tokprune.video.job import VideoError
from tokprune.video.picture import UPRIGHT, Orientation

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Packet: TypeAlias = Any  # PyAV's own type says that a packet may hold subtitles
MOST_ERRORS = 32  # read errors in a row after which the rest of a file counts as lost
TEXT_AND_STILLS = ("tty", "image2", "_pipe")  # FFmpeg reads text files and single pictures as videos, too


@dataclass(frozen=True, eq=False)
class Index:
    """The frames to choose from. timestamps: (N,) ascending seconds from the first. size: (height, width), upright."""

    path: Path
    timestamps: npt.NDArray[np.float64]
    duration: float
    size: tuple[int, int]
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Number of displayed frames."""
        return len(self.timestamps)

    @property
    def fps(self) -> float:
        """Mean rate, from the timestamps."""
        if self.total > 1 and self.timestamps[-1] > 0:
            return float((self.total - 1) / self.timestamps[-1])
        return self.total / self.duration if self.duration > 0 else 1.0


@dataclass(frozen=True, eq=False)
class PacketIndex(Index):
    """The index of a file with packets.

    pts: (N,) presentation times of the displayed frames in units of time_base, ascending, unique. position: (N,) place
    of each one's packet in the file's order. key_pts, key_position: (K,) the same of the key frames, ascending in pts.
    hidden: packets that an edit list hides. ordinal: the packets carry no times, so frames are counted as they are
    decoded.
    """

    stream: int = 0
    codec: str = ""
    time_base: Fraction = Fraction(1, 1)
    pts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    position: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    key_pts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    key_position: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    hidden: int = 0
    ordinal: bool = False
    orientation: Orientation = UPRIGHT


def import_av() -> ModuleType:
    """PyAV, or the error that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise missing_extra("av", "video", "reading video files") from error
    return av


def open_container(path: Path) -> InputContainer:
    """Open a local file. The protocol is pinned: a name such as `concat:…` or a playlist inside cannot reach elsewhere.

    By container_options: with `options` PyAV 15 crashes on files whose streams show up late (FLV), when it frees one
    set of options per stream.
    """
    av = import_av()
    try:
        return av.open(f"file:{path}", container_options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise VideoError(
            f"{path} is not a video that FFmpeg can read, or is damaged at its beginning: {error}"
        ) from error


def close_container(container: InputContainer) -> None:
    """Close a file once its decoders' threads rest.

    PyAV frees a decoder with Python's lock in hand, and FFmpeg then waits for the decoder's threads. One that has
    something to report waits for that lock, if anybody lets FFmpeg report to Python (importing torchvision below 0.22
    does): for ever. Emptying the decoder first waits for the threads without the lock.
    """
    for stream in container.streams.video:
        if stream.codec_context is not None:
            stream.codec_context.flush_buffers()
    container.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """A local file, open for the length of a with-block."""
    container = open_container(path)
    try:
        yield container
    finally:
        close_container(container)


def pick_stream(container: InputContainer, path: Path) -> VideoStream:
    """The main video stream; cover art of audio files is none."""
    name = container.format.name
    if any(name == kind or name.endswith(kind) for kind in TEXT_AND_STILLS):
        raise VideoError(f"{path} is not a video (FFmpeg takes it for {name!r}).")
    streams = [s for s in container.streams.video if not is_cover(s)]
    if not streams:
        others = ", ".join(f"{s.type}" for s in container.streams) or "none"
        raise VideoError(f"{path} has no video stream. Streams in it: {others}.")
    best = container.streams.best("video")
    chosen = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if chosen.codec_context is None:
        raise VideoError(f"{path} holds a kind of video that this build of FFmpeg cannot decode; convert it to H.264.")
    return chosen


def stream_of(container: InputContainer, number: int) -> VideoStream:
    """The stream that an index was made of, set to decode in parallel unless it decodes already."""
    stream = cast("VideoStream", container.streams[number])
    if not stream.codec_context.is_open:
        stream.thread_type = "AUTO"
    return stream


def is_cover(stream: VideoStream) -> bool:
    """Whether a video stream is the picture of an album."""
    return bool(stream.disposition.value & 0x400)  # AV_DISPOSITION_ATTACHED_PIC; the name differs between PyAV versions


def packets(container: InputContainer, stream: VideoStream, trouble: list[str] | None = None) -> Iterator[Packet]:
    """Packets of a stream in file order. Read errors go to `trouble`; too many in a row end the file. Never endless."""
    av, failures = import_av(), 0
    while failures < MOST_ERRORS:
        try:
            for packet in container.demux(stream):
                if packet.size == 0 and packet.dts is None:
                    return  # PyAV's mark of the end
                failures = 0
                yield packet
            return
        except av.error.EOFError:
            return
        except av.error.FFmpegError as error:
            failures += 1
            if trouble is not None:
                trouble.append(str(error))


def shown(packet: Packet, codec: str) -> bool:
    """Whether a packet's frame is displayed: not cut by an edit list, no invisible reference frame of VP8."""
    return not packet.is_discard and not (codec == "vp8" and packet.size > 0 and not memoryview(packet)[0] & 0x10)


@dataclass
class _Packets:
    """What one pass over the packets of a video stream collects."""

    first: Any = None
    """The first frame that could be decoded; its orientation is that of the video."""
    pts: list[int] = field(default_factory=list)
    """Presentation time of each shown packet, in units of the stream's time base."""
    place: list[int] = field(default_factory=list)
    """Number of each shown packet in the file."""
    keys: list[tuple[int, int]] = field(default_factory=list)
    """(time, number) of the key frames."""
    count: int = 0
    hidden: int = 0
    broken: int = 0
    timeless: int = 0
    last_duration: int = 0

    def add(self, packet: Packet, codec: str, error: type[Exception]) -> None:
        """Take one packet in; only the first frame is decoded."""
        number, self.count = self.count, self.count + 1
        if self.first is None:
            with contextlib.suppress(error):  # the next packet may do
                self.first = next(iter(packet.decode()), None)
        if packet.pts is None:
            self.timeless += 1
            return
        if packet.is_keyframe:
            self.keys.append((packet.pts, number))
        if packet.is_corrupt:
            self.broken += 1
        elif shown(packet, codec):
            self.pts.append(packet.pts)
            self.place.append(number)
            self.last_duration = packet.duration or self.last_duration
        elif packet.is_discard:
            self.hidden += 1

    def usable(self, warnings: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Times, ascending, and file positions of the frames that can be decoded."""
        times, where = np.unique(np.asarray(self.pts, np.int64), return_index=True)
        position = np.asarray(self.place, np.int64)[where]
        self.keys.sort()
        if self.keys and len(times):
            # Pictures before the first key frame, in time or in the file, lack what they refer to.
            first_key = min(self.keys, key=lambda k: k[1])
            stay = (times >= first_key[0]) & (position >= first_key[1])
            if lost := int((~stay).sum()):
                warnings.append(f"{lost} frames before the first key frame cannot be decoded and are not counted")
                times, position = times[stay], position[stay]
        return times, position


def scan_packets(path: Path) -> PacketIndex:
    """Read the index of a video file. Memory: some numbers per frame.

    Raises VideoError when the file is no video, has no video stream or no decodable frame, MissingExtraError without
    PyAV.
    """
    av = import_av()
    warnings: list[str] = []
    trouble: list[str] = []
    seen = _Packets()
    with opened(path) as container:
        stream = pick_stream(container, path)
        codec, time_base = stream.codec_context.name, stream.time_base or Fraction(1)
        # Read now: a closed container's streams are dangling.
        number, rate = stream.index, float(stream.average_rate or 25)
        promised, header = stream.frames, container.duration if len(container.streams) == 1 else None
        for packet in packets(container, stream, trouble):
            seen.add(packet, codec, av.error.FFmpegError)
        if seen.first is None and seen.count:
            with contextlib.suppress(av.error.FFmpegError):  # a file shorter than the decoder's delay
                seen.first = next(iter(stream.codec_context.decode(None)), None)
    _check_decodable(path, seen, trouble, warnings)
    orientation = Orientation.of(seen.first)
    common: JsonObject = {
        "path": path,
        "size": orientation.size(seen.first.height, seen.first.width),
        "stream": number,
        "codec": codec,
        "hidden": seen.hidden,
        "orientation": orientation,
    }
    if seen.timeless > seen.count // 2:
        return count_frames(path, rate, warnings, common)
    times, position = seen.usable(warnings)
    if not len(times):
        raise VideoError(
            f"{path} shows no frame: {seen.hidden} of {seen.count} are hidden by its edit list{cause(trouble)}."
        )
    timestamps = (times - times[0]) * float(time_base)
    gap = float(timestamps[-1] / (len(times) - 1)) if len(times) > 1 else 0.0
    duration = float(timestamps[-1]) + (float(seen.last_duration * time_base) or gap or 1 / rate)
    if promised > seen.count:
        warnings.append(f"the file is cut off: it announces {promised} frames and holds {seen.count}")
    elif header and not seen.hidden and header / av.time_base - duration > max(1.0, 2 * gap):
        announced = header / av.time_base
        warnings.append(f"the file may be cut off: it announces {announced:.2f} s and holds {duration:.2f} s")
    return PacketIndex(
        timestamps=timestamps,
        duration=duration,
        warnings=tuple(warnings),
        time_base=time_base,
        pts=times,
        position=position,
        key_pts=np.asarray([k[0] for k in seen.keys], np.int64),
        key_position=np.asarray([k[1] for k in seen.keys], np.int64),
        **common,
    )


def _check_decodable(path: Path, seen: _Packets, trouble: list[str], warnings: list[str]) -> None:
    """Refuse a stream that holds no frame to be shown; warn of one that is damaged."""
    if not seen.count:
        raise VideoError(f"{path} has a video stream without a single frame{cause(trouble)}.")
    if seen.first is None:
        raise VideoError(f"{path}: none of the {seen.count} frames can be decoded{cause(trouble)}.")
    if trouble:
        warnings.append(f"{len(trouble)} places in the file cannot be read ({trouble[0]})")
    if seen.broken:
        warnings.append(f"{seen.broken} frames are stored incompletely and were left out")


def count_frames(path: Path, rate: float, warnings: list[str], common: JsonObject) -> PacketIndex:
    """The index of a file whose packets carry no times (raw streams, some AVI files): decode all, keep none, count."""
    with opened(path) as container:
        stream = stream_of(container, common["stream"])
        total = sum(1 for _ in decode_all(container, stream))
    warnings.append(f"the file carries no timestamps; frames are taken to be 1/{rate:g} s apart")
    return PacketIndex(
        timestamps=np.arange(total) / rate, duration=total / rate, warnings=tuple(warnings), ordinal=True, **common
    )


def decode_all(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame in the order of display; packets that cannot be decoded are passed over."""
    av = import_av()
    for packet in packets(container, stream):
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            continue
    try:
        yield from stream.codec_context.decode(None)
    except av.error.FFmpegError:
        return


def cause(trouble: list[str]) -> str:
    """The first read error, as the end of a sentence."""
    return f" ({trouble[0]})" if trouble else ""
