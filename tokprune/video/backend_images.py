"""Folders of pictures and animated GIF, WebP and PNG files, through Pillow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokprune.errors import OptionError
from tokprune.files import read_picture, rgb
from tokprune.video.index import Index
from tokprune.video.job import Job, VideoError
from tokprune.video.picture import Frame

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"})
MAGIC = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\x00", b"MM\x00*")


@dataclass(frozen=True, eq=False)
class FolderIndex(Index):
    """files: the pictures in natural order."""

    files: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class AnimationIndex(Index):
    """The index of an animated picture."""


def is_picture(path: Path) -> bool:
    """Whether a file begins like a still or animated picture."""
    with path.open("rb") as file:
        head = file.read(16)
    return head.startswith(MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def natural(path: Path) -> tuple[object, ...]:
    """Sort key that reads runs of digits as numbers: frame9 before frame10, however many zeros lead."""
    parts = re.split(r"(\d+)", path.name.lower())
    return (*((int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)), (-1, path.name))


def scan_folder(path: Path, fps: float) -> FolderIndex:
    """The pictures directly in a folder, shown at `fps`. Hidden files and other kinds are not counted."""
    files = sorted(
        (p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".") and p.is_file()),
        key=natural,
    )
    if not files:
        raise VideoError(f"{path} is a folder without pictures ({', '.join(sorted(PICTURES))}).")
    size, why = None, ""
    for file in files:
        try:
            size = load(file).shape[:2]
            break
        except OptionError as error:  # a broken picture is reported when it is wanted
            why = why or str(error)
    if size is None:
        raise VideoError(f"{path}: none of its {len(files)} pictures can be read; of the first: {why}")
    times = np.arange(len(files)) / fps
    return FolderIndex(path, times, len(files) / fps, (size[0], size[1]), files=tuple(files))


def load(file: Path) -> Frame:
    """One picture, upright, (H, W, 3); raises OptionError for one that cannot be read."""
    return np.asarray(read_picture(file))


def decode_folder(index: FolderIndex, wanted: Sequence[int], job: Job) -> Iterator[tuple[int, Frame]]:
    """Read the pictures `wanted`."""
    for i in wanted:
        job.check()
        try:
            frame = load(index.files[i])
        except OptionError as error:
            job.notes.append(str(error))
            continue
        yield i, frame


def scan_animation(path: Path) -> AnimationIndex:
    """Count the pictures of an animation and add up their durations; one picture is held at a time."""
    from PIL import Image

    durations: list[float] = []
    warnings: tuple[str, ...] = ()
    try:
        with Image.open(path) as image:
            size = (image.height, image.width)
            total = getattr(image, "n_frames", 1)
            kind = image.format
            for i in range(total if total > 1 else 0):
                try:
                    image.seek(i)
                    image.load()  # a WebP knows a picture's duration only then
                except (OSError, ValueError, SyntaxError, EOFError) as error:
                    warnings = (f"the animation breaks off after {i} of {total} pictures: {error}",)
                    break
                # As browsers do: next to no duration means 0.1 s.
                ms = float(image.info.get("duration", 0) or 0)
                durations.append(ms / 1000 if ms > 10 else 0.1)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is a picture file that cannot be read: {error}") from error
    if total <= 1:
        raise VideoError(f"{path} is a still picture ({kind}), not a video; give it to the processor as images=.")
    if not durations:
        raise VideoError(f"{path}: none of its {total} pictures can be decoded.")
    ends = np.cumsum(durations)
    return AnimationIndex(path, ends - durations, float(ends[-1]), size, warnings)


def decode_animation(index: AnimationIndex, wanted: Sequence[int], job: Job) -> Iterator[tuple[int, Frame]]:
    """Read pictures of an animation, front to back (each builds on the one before)."""
    from PIL import Image

    with Image.open(index.path) as image:
        for i in wanted:
            job.check()
            try:
                image.seek(i)
                frame = np.asarray(rgb(image))
            except (OSError, ValueError, SyntaxError, EOFError) as error:
                job.notes.append(f"picture {i} cannot be decoded: {error}")
                continue
            yield i, frame
