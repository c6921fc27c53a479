"""decord, guarded: in a process of its own with a time limit, and only where its frames can be right.

decord counts the frames that an edit list hides and returns wrong ones from then on, without an error, and its native
code can spin for ever while it holds the interpreter's lock. So the file is checked against the packet index first, the
work is done by `main` in a process that can be ended, and each frame's time is checked when it arrives.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from tokprune.errors import missing_extra
from tokprune.types import JsonObject
from tokprune.video.backend_torchcodec import check_time
from tokprune.video.index import PacketIndex
from tokprune.video.job import Job, VideoError
from tokprune.video.picture import Frame

TIME_LIMIT = 120.0  # seconds, where the caller sets none


def decode(index: PacketIndex, wanted: Sequence[int], job: Job) -> Iterator[tuple[int, Frame]]:
    """Decode the frames `wanted` (ascending, unique display indices); yields (index, upright RGB frame)."""
    if importlib.util.find_spec("decord") is None:
        raise missing_extra("decord", "video", "backend='decord'")
    if index.hidden:
        raise VideoError(
            f"{index.path} has an edit list that hides {index.hidden} frames; decord ignores it and returns wrong "
            "frames. Use backend='pyav'."
        )
    if index.orientation.mirrored:
        raise VideoError(f"{index.path} is to be shown mirrored, which decord gets wrong; use backend='pyav'.")
    if index.ordinal:
        raise VideoError(f"{index.path} carries no timestamps to check decord's frames by; use backend='pyav'.")
    limit = job.left(TIME_LIMIT)
    search = os.pathsep.join(p for p in sys.path if p)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from tokprune.video.backend_decord import main; main()", str(index.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": search},
        )
        expired = threading.Event()

        def end() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(max(limit, 0.01), end)
        timer.daemon = True
        timer.start()
        try:
            if process.stdin is not None and process.stdout is not None:  # both are pipes: for the type checker
                with contextlib.suppress(OSError):  # it has ended already: its message is read below
                    process.stdin.write(json.dumps([int(i) for i in wanted]).encode())
                    process.stdin.close()
                yield from receive(index, process.stdout, job)
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if expired.is_set():
            raise VideoError(
                f"decord had not finished {index.path} after {max(limit, 0):.0f} s and was ended (it is known to "
                "hang). Use backend='pyav', or a larger time_limit=."
            )
        if process.returncode:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            raise VideoError(
                f"decord failed on {index.path}: {lines[-1] if lines else process.returncode}. Use backend='pyav'."
            )


def receive(index: PacketIndex, pipe: IO[bytes], job: Job) -> Iterator[tuple[int, Frame]]:
    """Read the worker's answers: a line of JSON, then for a frame its pixels."""
    seconds = index.timestamps
    while line := pipe.readline():
        head: JsonObject = json.loads(line)
        if "total" in head:
            if head["total"] != index.total:
                raise VideoError(
                    f"decord counts {head['total']} frames in {index.path} where the packets show {index.total}; its "
                    "indices would name other frames. Use backend='pyav'."
                )
        elif "failed" in head:
            job.notes.append(f"decord cannot decode frame {head['failed']}: {head['error']}")
        else:
            shape = tuple(head["shape"])
            data = pipe.read(int(np.prod(shape)))
            if len(data) < np.prod(shape):
                return  # ended in the middle
            check_time("decord", index, seconds, head["index"], head["time"])
            yield head["index"], np.frombuffer(data, np.uint8).reshape(shape)  # decord has turned it upright


def main() -> None:
    """What runs in the process of its own: path in argv, wanted indices on stdin; answers as `receive` reads them."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints must not get between the answers
    wanted = json.loads(sys.stdin.read())
    import decord

    reader = decord.VideoReader(sys.argv[1], num_threads=max(2, min(8, os.cpu_count() or 2)))
    out.write(json.dumps({"total": len(reader)}).encode() + b"\n")
    out.flush()
    origin = float(reader.get_frame_timestamp(0)[0]) if len(reader) else 0.0
    for i in wanted:
        try:
            frame = reader[i].asnumpy()
            time = float(reader.get_frame_timestamp(i)[0]) - origin
        except Exception as error:
            text = str(error).strip().splitlines()
            out.write(json.dumps({"failed": i, "error": text[0][:200] if text else "?"}).encode() + b"\n")
            continue
        out.write(json.dumps({"index": i, "time": time, "shape": frame.shape}).encode() + b"\n")
        out.write(frame.tobytes())
    out.flush()
