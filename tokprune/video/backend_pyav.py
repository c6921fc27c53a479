"""PyAV: exact frames by the packet index, decoding each stretch between key frames at most once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np

from tokprune.video.index import (
    Packet,
    PacketIndex,
    close_container,
    decode_all,
    import_av,
    open_container,
    opened,
    packets,
    stream_of,
)
from tokprune.video.job import Job, VideoError
from tokprune.video.picture import Frame, Orientation

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

NEAR = 8  # packets: to decode on through a gap this short is cheaper than to empty and refill the decoder's threads
# Codecs whose non-reference pictures are never referred to. (HEVC's may be, by a higher temporal layer.)
SKIPPABLE = frozenset({"h264", "mpeg4", "mpeg2video", "mpeg1video"})

# Types of pictures that refer to others: P, B, S. (Codecs without types say 0.)
BETWEEN = frozenset({2, 3, 4})

Stretch = tuple[int, list[int]]  # number of the key frame to start from, wanted frames from there on


def decode(index: PacketIndex, wanted: Sequence[int], job: Job) -> Iterator[tuple[int, Frame]]:
    """Decode the frames `wanted` (ascending, unique display indices); yields (index, upright RGB frame) in any order.

    Pictures that no other picture refers to are not decoded unless wanted. What does not come out is tried once more
    with everything decoded; what then is still lacking does not exist.
    """
    if index.ordinal:
        yield from counted(index, wanted, job)
        return
    left = set(wanted)
    for skip in (True, False) if index.codec in SKIPPABLE else (False,):
        if left:
            for i, frame in stretches(index, sorted(left), skip, job):
                left.discard(i)
                yield i, frame


def counted(index: PacketIndex, wanted: Sequence[int], job: Job) -> Iterator[tuple[int, Frame]]:
    """The same for files without times: count frames as they come."""
    want = set(wanted)
    with opened(index.path) as container:
        stream = stream_of(container, index.stream)
        for i, frame in enumerate(decode_all(container, stream)):
            job.check()
            if i in want:
                want.discard(i)
                yield i, picture(frame, i, job)
                if not want:
                    return


def plan(index: PacketIndex, wanted: Sequence[int]) -> list[Stretch]:
    """Group wanted frames into stretches that are decoded in one go."""
    parts: list[Stretch] = []
    end = -1
    for i in wanted:
        key = max(int(np.searchsorted(index.key_pts, index.pts[i], side="right")) - 1, 0)
        start = int(index.key_position[key]) if len(index.key_position) else 0
        if parts and start <= end + NEAR:
            parts[-1][1].append(i)
        else:
            parts.append((key, [i]))
        end = max(end, int(index.position[i]))
    return parts


def stretches(index: PacketIndex, wanted: Sequence[int], skip: bool, job: Job) -> Iterator[tuple[int, Frame]]:
    """One pass over the file."""
    container = open_container(index.path)
    try:
        todo, fresh = plan(index, wanted), True
        while todo:
            key, members = todo.pop(0)
            source = None
            if len(index.key_pts) and index.key_position[key] >= NEAR:
                source, fresh = sought(container, index, key, job), False
            if source is None:
                if not fresh:
                    close_container(container)
                    container = open_container(index.path)
                source = from_start(container, index, key, job)
            fresh = False
            try:
                yield from stretch(container, index, key, source, members, skip, job)
            except NoEntry:
                # Not only here: where one key frame is none (gradual refresh), the others are none, either.
                members, todo = [i for part in ((key, members), *todo) for i in part[1]], []
                close_container(container)
                container = open_container(index.path)
                source = packets(container, stream_of(container, index.stream))
                yield from stretch(container, index, None, source, members, skip, job)
    finally:
        close_container(container)


class NoEntry(Exception):
    """What the file marks as a key frame refers to earlier pictures: decoding cannot begin there."""


def sought(container: InputContainer, index: PacketIndex, key: int, job: Job) -> Iterator[Packet] | None:
    """Packets from a key frame on, by seeking; None when the container's seek does not lead there."""
    av = import_av()
    stream = stream_of(container, index.stream)
    target = int(index.key_pts[key])
    try:
        container.seek(target, stream=stream, backward=True, any_frame=False)
        stream.codec_context.flush_buffers()
    except av.error.FFmpegError:
        return None
    source = packets(container, stream)
    for packet in source:
        job.check()
        if packet.is_keyframe and packet.pts == target:
            return chain([packet], source)
        if packet.is_keyframe and packet.pts is not None and packet.pts > target:
            return None
    return None


def from_start(container: InputContainer, index: PacketIndex, key: int, job: Job) -> Iterator[Packet]:
    """Packets from a key frame on, by reading past all before it; nothing is decoded on the way."""
    source = packets(container, stream_of(container, index.stream))
    if not len(index.key_pts):
        return source
    for at, packet in enumerate(source):
        job.check()
        if at == index.key_position[key]:
            return chain([packet], source)
    return iter(())


def stretch(
    container: InputContainer,
    index: PacketIndex,
    key: int | None,
    source: Iterator[Packet],
    members: list[int],
    skip: bool,
    job: Job,
) -> Iterator[tuple[int, Frame]]:
    """Decode from key frame number `key` (None: from the file's start) until the last wanted frame is out.

    Raises NoEntry before anything is yielded when that key frame is not decoded as one.
    """
    av = import_av()
    context = stream_of(container, index.stream).codec_context
    wanted = {int(index.pts[i]): i for i in members}
    waiting = set(wanted)
    entry = None if key is None or not key or not len(index.key_pts) else int(index.key_pts[key])

    def out(frames: Sequence[VideoFrame]) -> Iterator[tuple[int, Frame]]:
        nonlocal entry
        for frame in frames:
            if frame.pts == entry:
                if frame.pict_type in BETWEEN:
                    raise NoEntry
                entry = None
            if frame.pts in wanted:
                if entry is not None:
                    raise NoEntry
                i = wanted.pop(frame.pts)
                yield i, picture(frame, i, job)

    for packet in source:
        job.check()
        if skip:
            context.skip_frame = "DEFAULT" if packet.pts in wanted or packet.is_keyframe else "NONREF"
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError:
            frames = []
        yield from out(frames)
        waiting.discard(packet.pts)
        if not waiting or not wanted:
            break
    try:
        frames = context.decode(None)  # what the decoder still holds
    except av.error.FFmpegError:
        frames = []
    yield from out(frames)
    context.flush_buffers()


def picture(frame: VideoFrame, i: int, job: Job) -> Frame:
    """A decoded frame as upright RGB."""
    if frame.is_corrupt:
        job.damaged.append(i)
    try:
        pixels = cast("Frame", frame.to_ndarray(format="rgb24"))
    except (ValueError, MemoryError) as error:
        raise VideoError(f"frame {i} cannot be turned into RGB: {error}") from error
    turned: Frame = Orientation.of(frame).apply(pixels)
    return turned
