"""Clips whose frames say their own number: 16 black or white blocks in the top rows that survive lossy coding."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV (the video extra) makes the clips of these tests")

BITS, BLOCK = 16, 8
UNIT = 65536  # 1.0 in the 16.16 numbers of MP4's matrices


def drawn(number: int, height: int = 48, width: int = 128) -> np.ndarray:
    """A picture (H, W, 3) with `number` in its top left 8 × 128 pixels, over a gradient."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[..., 0] = np.linspace(0, 200, width).astype(np.uint8)
    frame[..., 1] = np.linspace(0, 200, height).astype(np.uint8)[:, None]
    frame[..., 2] = 60 + number % 60
    for bit in range(BITS):
        frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return frame


def number(frame: np.ndarray) -> int:
    """The number drawn into a decoded frame."""
    blocks = frame[2 : BLOCK - 2, : BITS * BLOCK].reshape(BLOCK - 4, BITS, BLOCK, 3)[:, :, 2:-2].mean((0, 2, 3))
    return int(sum(1 << bit for bit in range(BITS) if blocks[bit] > 128))


def numbers(frames: Iterable[np.ndarray]) -> list[int]:
    return [number(f) for f in frames]


def write(
    path: Path,
    count: int = 60,
    *,
    height: int = 48,
    width: int = 128,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 24,
    rate: int = 30,
    ticks: list[int] | None = None,
    time_base: Fraction | None = None,
    audio: bool = False,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    turn: tuple[bool, bool, bool] = (False, False, False),
) -> Path:
    """Encode `count` frames. ticks: their times in time_base (default: constant rate). turn: store them turned."""
    time_base = time_base or Fraction(1, rate)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        silence = out.add_stream("aac", rate=16000) if audio else None
        shape = (width, height) if turn[0] else (height, width)
        stream.height, stream.width, stream.pix_fmt = *shape, pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = gop
        stream.options = {"preset": "veryfast", "bf": "3", **(options or {})} if codec == "libx264" else options or {}
        for i in range(count):
            pixels = drawn(i, height, width)
            if turn[0]:
                pixels = pixels.swapaxes(0, 1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = (ticks[i] if ticks else i), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if silence is not None:
            sound(out, silence)
    return path


def sound(out: object, stream: object) -> None:
    """One second of silence."""
    for i in range(16):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, i * 1024
        out.mux(stream.encode(frame))  # type: ignore[attr-defined]
    out.mux(stream.encode())  # type: ignore[attr-defined]


def cut(source: Path, path: Path, first: int, rate: int = 30) -> Path:
    """Cut off the first frames without encoding anew, as `ffmpeg -ss … -c copy` does: an edit list hides them."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = int(Fraction(first, rate) / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is None:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            new.mux(packet)
    return path


def turned(source: Path, path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write another display matrix (a, b, c, d) into an MP4 file."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (UNIT * v for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
