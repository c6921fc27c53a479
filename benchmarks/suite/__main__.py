"""Measures tokprune against its targets.

python -m benchmarks.suite                                all sections of a CPU, each into its JSON
python -m benchmarks.suite prefill_llava start            some of them
python -m benchmarks.suite gpu [--device cpu --tiny]      what needs a GPU, in eight minutes
python -m benchmarks.suite report                         the tables of docs/performance.md, from the JSON
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.suite import gpu, llm, parts, report
from benchmarks.suite.rows import RESULTS, Row, save

SECTIONS: dict[str, Callable[[], Iterable[Row]]] = {
    "start": parts.start,
    "selection": parts.selection,
    "signals": llm.signals,
    "prefill_llava": partial(llm.prefill, "llava-1.5-7b", "LLaVA-1.5"),
    "prefill_qwen": partial(llm.prefill, "qwen2.5-vl-7b", "Qwen2.5-VL", (448, 672)),
    "encoder": parts.encoder,
    "video": parts.video,
    "counts": parts.counts,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}, gpu, report; all of the CPU by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--device", default="cuda", help="of gpu")
    parser.add_argument("--tiny", action="store_true", help="with gpu: sizes that any machine runs")
    parser.add_argument("--minutes", type=float, default=8, help="with gpu: no part begins later")
    args = parser.parse_args(arguments)
    names = args.sections or list(SECTIONS)
    if wrong := set(names) - {*SECTIONS, "gpu", "report"}:
        parser.error(f"no section {', '.join(sorted(wrong))}; there are {', '.join(SECTIONS)}, gpu and report")
    for name in names:
        begun = time.monotonic()
        if name == "report":
            report.PAGE.write_text(report.page(), encoding="utf-8")
            continue
        if name == "gpu":
            gpu.run(args.device, args.tiny, args.out, args.minutes)
        else:
            rows = []
            for row in SECTIONS[name]():
                print(row, flush=True)
                rows.append(row)
            save(args.out, name, rows)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
