"""The tables of docs/decoder.md, made from what the benchmarks of the decoder and cache stages wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def decoder_table(data: dict[str, Any]) -> str:
    """Accuracy by method and share of the prefill's FLOPs, what is worse than random in front of the LLM marked."""
    rows = data["rows"]
    base, targets = rows[0], list(dict.fromkeys(r["target"] for r in rows[1:] if r["target"]))
    at = {(r["method"], r["target"]): r for r in rows}
    names = list(dict.fromkeys((r["stage"], r["method"]) for r in rows[1:] if r["target"]))
    lines = [
        "| method | stage | " + " | ".join(f"{t:.0%} of the FLOPs" for t in targets) + " |",
        "|---|---|" + "---:|" * len(targets),
    ]
    for stage, name in sorted(names, key=lambda n: n[0]):
        cells = []
        for target in targets:
            cell, rival = at.get((name, target)), at["random", target]
            if cell is None:
                cells.append("")
                continue
            mark = " ↓" if cell["accuracy"] < rival["accuracy"] else ""
            cells.append(f"{cell['accuracy']:.1%}{mark} ({', '.join(str(k) for k in cell['kept'])})")
        lines.append(f"| {name} | {stage} | " + " | ".join(cells) + " |")
    others = [
        f"{r['method']} {r['accuracy']:.1%} at {r['flops']:.0%} of the FLOPs" for r in rows[1:] if not r["target"]
    ]
    note = (
        f"In brackets tokens behind each drop. All {base['kept'][0]} tokens: {base['accuracy']:.1%} right. "
        f"{'; '.join(others)}. FLOPs met to {data['tolerance']:.0%}; {data['questions']} held-out questions, so one is "
        f"{1 / data['questions']:.1%}. ↓ marks what is below random in front of the LLM. `{data['command']}` at commit "
        f"{data['commit']}, {data['environment']['machine']}."
    )
    return "\n".join([*lines, "", note])


def cache_table(data: dict[str, Any]) -> str:
    """Accuracy of second questions by method and share of the visual keys that a step reads."""
    rows = data["rows"]
    base, shares = rows[0], list(dict.fromkeys(r["share"] for r in rows[1:]))
    at = {(r["method"], r["share"]): r for r in rows}
    names = list(dict.fromkeys((r["stage"], r["method"]) for r in rows[1:]))
    lines = [
        "| method | stage | keys held | prefill | " + " | ".join(f"{s:.0%} of the keys read" for s in shares) + " |",
        "|---|---|---|---|" + "---:|" * len(shares),
    ]
    for stage, name in names:
        cells = []
        mine = [at[name, s] for s in shares if (name, s) in at]
        for share in shares:
            cell = at.get((name, share))
            if cell is None:
                cells.append("")
                continue
            cells.append(f"{cell['accuracy']:.1%}{' ↓' if cell['accuracy'] < at['random', share]['accuracy'] else ''}")
        span = [[round(100 * r[what]) for r in (mine[0], mine[-1])] for what in ("held", "prefill_flops")]
        told = [f"{a} %" if a == b else f"{a} to {b} %" for a, b in span]
        lines.append(f"| {name} | {stage} | {' | '.join(told)} | " + " | ".join(cells) + " |")
    note = (
        f"All keys: {base['accuracy']:.1%} right. Keys held in memory are the mean over layers, prefill its FLOPs with "
        f"what choosing costs, from the largest share to the smallest. {data['questions']} held-out questions, so one "
        f"is {1 / data['questions']:.1%}. ↓ marks what is below random in front of the LLM. `{data['command']}` at "
        f"commit {data['commit']}, {data['environment']['machine']}."
    )
    return "\n".join([*lines, "", note])


def memory_table(data: dict[str, Any]) -> str:
    """Bytes of cache and prefill by setting, counted and by arithmetic."""
    rows, shape = data["rows"], data["shape"]
    base = rows[0]
    lines = [
        "| setting | keys and values behind the prefill | by arithmetic | peak of the prefill | by arithmetic |",
        "|---|---:|---:|---:|---:|",
    ]

    def cell(n: int, full: int) -> str:
        return f"{n / 1e6:.2f} MB ({n / full:.0%})"

    for r in rows:
        cache = [cell(r[name], base["cache"]) for name in ("cache", "cache_by_arithmetic")]
        peak = [cell(r[name], base["peak"]) for name in ("peak", "peak_by_arithmetic")]
        lines.append(f"| {r['setting']} | " + " | ".join([*cache, *peak]) + " |")
    note = (
        f"Bytes of live tensors, weights and inputs left out, in float32: {shape['layers']} layers of width "
        f"{shape['width']}, {shape['visual']} visual tokens and {shape['text']} others. `{data['command']}` at commit "
        f"{data['commit']}, {data['environment']['machine']}."
    )
    return "\n".join([*lines, "", note])


def steps_table(data: dict[str, Any]) -> str:
    """Time of a decode step over the plain model's, and what two plain models are apart."""
    rows = data["rows"]
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    at = {(r["setting"], r["size"]): r for r in rows}

    def cell(r: dict[str, Any]) -> str:
        return f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"

    lines = ["| setting | drops | " + " | ".join(sizes) + " |", "|---|---:|" + "---:|" * len(sizes)]
    for name in dict.fromkeys(r["setting"] for r in rows):
        cells, drops = [cell(at[name, size]) for size in sizes], at[name, sizes[0]]["drops"]
        lines.append(f"| {'two plain models' if name == 'none' else name} | {drops} | {' | '.join(cells)} |")
    plain = " and ".join(f"{at['none', size]['plain_ms']:.0f} ms" for size in sizes)
    note = (
        f"Time of a step over the plain model's on the same weights and keys: the median of {data['steps']} pairs and "
        f"its 95 % interval. A plain step takes {plain}. `{data['command']}` at commit {data['commit']}, "
        f"{data['environment']['machine']}."
    )
    return "\n".join([*lines, "", note])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "decoder_demo": decoder_table,
    "cache_demo": cache_table,
    "decoder_memory": memory_table,
    "decoder_steps": steps_table,
}
"""Blocks of the page by name, which is that of the file with the numbers, too."""
