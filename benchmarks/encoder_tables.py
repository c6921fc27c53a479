"""The measured tables of docs/encoder.md, from benchmarks/results/encoder_*.json.

python benchmarks/encoder_tables.py            writes them between their markers
python benchmarks/encoder_tables.py --check    only says whether they are current
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "encoder.md"


def source(data: dict[str, Any]) -> str:
    """Where a table's numbers come from."""
    return (
        f"`{data['command']}` at commit {data['commit']}, {data['environment']['machine']}, "
        f"torch {data['environment']['torch']}."
    )


def speed(data: dict[str, Any]) -> str:
    """CPU time of hooks and of the written-out forward."""
    lines = ["| variant | CPU seconds | speed-up |", "|---|---:|---:|"]
    lines += [f"| {r['variant']} | {r['cpu_seconds']:.2f} | ×{r['speedup']:.2f} |" for r in data["rows"]]
    cost, plain = data["hook_seconds_per_block"], data["rows"][0]["cpu_seconds"]
    share = cost * data["blocks"] / plain
    note = (
        f"{data['model']}, batch {data['batch']}, one thread, least of {data['rounds']} rounds. The hooks themselves "
        f"cost {cost * 1e6:.0f} µs per block ({share:.2%} of the plain forward). "
    )
    return "\n".join([*lines, "", note + source(data)])


def demo(data: dict[str, Any]) -> str:
    """Accuracy and encoder time at matched FLOPs."""
    lines = [
        "| method | tower FLOPs | left | accuracy, one token per group | accuracy, all places | encoder, ms per "
        "picture | unreduced, same rounds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in data["rows"]:
        mark = "" if r["matched"] else " *"
        copies = "" if r["copies"] is None else f"{r['copies']:.3f}"
        lines.append(
            f"| {r['method']} | {r['flops']:.1%}{mark} | {r['left']:.0%} | {r['places']:.3f} | {copies} "
            f"| {r['encoder_ms']:.2f} | {r['baseline_ms']:.2f} |"
        )
    targets = " and ".join(f"{t:.0%}" for t in dict.fromkeys(r["target"] for r in data["rows"][1:]))
    note = (
        f"Strengths set so that the tower's FLOPs are {targets} of the unreduced tower's, to "
        f"within {data['tolerance']:.0%} (* where a method "
        f"cannot). {data['questions']} questions, so one is {1 / data['questions']:.3f}; times are medians "
        f"of {data['rounds']} rounds, in turns with "
        f"the unreduced tower, {data['pictures']} pictures a batch, one thread. "
    )
    return "\n".join([*lines, "", note + source(data)])


def images(data: dict[str, Any]) -> str:
    """Images per second."""
    lines = ["| model | batch | method | images/s | speed-up | FLOPs |", "|---|---:|---|---:|---:|---:|"]
    for r in data["rows"]:
        lines.append(
            f"| {r['model']} | {r['batch']} | {r['variant']} | {r['images_per_second']:.2f} | ×{r['speedup']:.2f} "
            f"| {r['flops']:.0%} |"
        )
    note = f"Random weights, {data['device']}, {data['dtype']}, median of {data['rounds']} rounds. "
    return "\n".join([*lines, "", note + source(data)])


TABLES = {"encoder_speed": speed, "encoder_demo": demo, "encoder_images": images}


def page(text: str) -> str:
    """`text` with its tables made anew."""
    for name, table in TABLES.items():
        path = ROOT / "benchmarks" / "results" / f"{name}.json"
        block = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"docs/encoder.md has no block {name}")
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if data.get("version", 0) < 2:  # not measured in this form yet: what stands there stays
            print(f"no new {path.relative_to(ROOT)}; its table is left as it is", file=sys.stderr)
            continue
        content = table(data)
        text = block.sub(lambda m, content=content: m.group(1) + content + "\n" + m.group(2), text)  # type: ignore[misc]
    return text


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if new == old:
        return
    print(f"{'stale' if check else 'wrote'}: {PAGE.relative_to(ROOT)}")
    if check:
        sys.exit(1)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
