"""The process in which decord runs: path in argv, wanted indices on stdin, frames on stdout. See `backend_decord`."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Answer with lines of JSON, each frame's followed by its pixels."""
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


if __name__ == "__main__":
    main()
