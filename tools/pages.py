"""Makes the generated pages: docs/methods.md from the registry, and the tables of README.md from benchmarks/results/.

`python -m tools.pages` (or `make docs`) writes them; with --check it only says whether they are current (a test runs
that).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite import report
from tests.core.layers import layers_table
from tokprune.adapters.foreign import FOREIGN
from tokprune.cli.methods import facts, families_of
from tokprune.evaluation.reference import models
from tokprune.ops.blocks import WHOLE
from tokprune.registry import STAGES, list_methods, method_class
from tools.decoder_page import TABLES
from tools.reference_page import reference_page
from tools.serving_page import clips_table, load_table
from tools.support_page import numbers, support_page

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def yes(flag: bool) -> str:
    """A table cell."""
    return "yes" if flag else ""


def methods_page() -> str:
    """docs/methods.md: every registered method, by stage."""
    lines = [
        "# Methods",
        "",
        "Made by `make docs` from the registry and the docstrings; do not edit. `tokprune methods NAME` explains one "
        "in the terminal.",
        "",
        "N tokens of width D, K kept; in a tower C channels, H heads, L blocks; in an LLM n tokens of the prompt,",
        "V of them visual, T words (of a video, T frames). Memory: what one decision holds beside its input, in one",
        f"block or layer, for a picture of more than {WHOLE:,} tokens; up to that number methods that compare all",
        "pairs hold them, N² float32. A test counts the bytes.",
        "",
    ]
    for stage in STAGES:
        rows = [facts(name) for name in list_methods(stage)]
        if not rows:
            continue
        lines += [
            f"## Stage `{stage}`",
            "",
            "| method | what it does | signals | reads the question | merges | deterministic | adaptive count | "
            "time | memory | paper |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            paper = f"[{r['paper']}]({r['url']})" if r["url"] else r["paper"]
            year = f" ({r['year']})" if r["year"] else ""
            needs = families_of(r["needs"])
            lines.append(
                f"| `{r['name']}` | {r['summary']} | {needs} | {yes(r['query_aware'])} | {yes(r['merges'])} | "
                f"{yes(r['deterministic'])} | {yes(r['adaptive'])} | {r['complexity']} | {r['memory']} | "
                f"{paper}{year} |"
            )
        lines += ["", *checked_table(rows)]
        for r in rows:
            lines += [f"### `{r['name']}`", "", r["doc"], ""]
            if r["needs"]:
                lines += ["Signals: " + ", ".join(f"`{n}`" for n in r["needs"]) + ".", ""]
            if r["options"]:
                lines += ["Options: " + ", ".join(f"`{k}={v!r}`" for k, v in r["options"].items()) + ".", ""]
            if r["presets"]:
                lines += [
                    "Presets: " + "; ".join(f"`preset={k!r}` is {given(v)}" for k, v in r["presets"].items()) + ".",
                    "",
                ]
    return "\n".join(lines).rstrip() + "\n"


def given(options: dict[str, Any]) -> str:
    """Options as they are written."""
    return ", ".join(f"`{k}={v!r}`" for k, v in options.items())


def checked_table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows "checked against": which published code each method was run against, and what came out."""
    lines = ["| checked against | official code | what agrees | what differs |", "|---|---|---|---|"]
    for r in rows:
        c = r["checked"]
        if c is None:
            lines.append(f"| `{r['name']}` | none: {r['paper'].partition(':')[0]} |  |  |")
            continue
        link = f"[{c['repository']}](https://github.com/{c['repository']})" if c["repository"] else "none found"
        agrees, differs = (c[side].replace("|", r"\|") for side in ("agrees", "differs"))
        lines.append(f"| `{r['name']}` | {link} | {agrees} | {differs} |")
    return [*lines, ""]


def cells_table(data: dict[str, Any], times: bool = True) -> str:
    """A sweep as accuracy per method and keep ratio, what is worse than random marked. times: measured alone on the
    machine."""
    cells = data["cells"]
    base = next(c for c in cells if c["method"] == "none")
    ratios = sorted({c["ratio"] for c in cells if c["method"] != "none" and c["ratio"] < 1}, reverse=True)
    at = {(c["method"], c["ratio"]): c for c in cells}
    order = list(dict.fromkeys(c["method"] for c in cells if c["method"] != "none"))
    counts = {r: next(c["kept"] for c in cells if c["ratio"] == r and c["method"] != "none") for r in ratios}
    head = ["method", *(f"{r:.0%} ({counts[r]:.0f} tokens)" for r in ratios)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(ratios)]
    for method in order:
        row = []
        for r in ratios:
            cell, rival = at.get((method, r)), at.get(("random", r))
            if cell is None:
                row.append("")
                continue
            worse = rival is not None and method != "random" and cell["accuracy"] < rival["accuracy"]
            row.append(f"{cell['accuracy']:.1%}" + (" ↓" if worse else ""))
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    costs = [
        next(c for c in cells if c["ratio"] == r and c["method"] == "divprune") for r in ratios if ("divprune", r) in at
    ]
    if costs:
        if times:
            lines.append("| LLM prefill, divprune | " + " | ".join(f"{c['prefill_ms']:.2f} ms" for c in costs) + " |")
        lines.append(
            "| FLOPs per answer, divprune | " + " | ".join(f"{c['flops'] / base['flops']:.0%}" for c in costs) + " |"
        )
    prefill = f", prefill {base['prefill_ms']:.2f} ms" if times else ""
    note = (
        f"All {base['total']:.0f} tokens: {base['accuracy']:.1%} right{prefill}. {data['questions']} held-out "
        f"questions per cell; `{data['command']}`, {data['environment']['machine']}."
    )
    if any("↓" in line for line in lines):
        note += " ↓ marks what is below random."
    return "\n".join([*lines, "", note])


def methods_block() -> str:
    """The names of README.md, by what they are for."""
    names = list_methods("connector")
    wrappers = [n for n in names if method_class(n).info.wrapper]
    videos = [n for n in names if method_class(n).info.video]
    plain = [n for n in names if n not in wrappers and n not in videos]
    rows = [
        ("between encoder and LLM", plain),
        ("the same, for videos", videos),
        ("around another method", wrappers),
        ("before the vision tower, by pixels", list_methods("pixels")),
        ("which frames of a video", list_methods("frames")),
        ("inside the vision tower", list_methods("encoder")),
        ("inside the LLM", list_methods("decoder")),
        ("while decoding", list_methods("cache")),
    ]
    lines = ["| where | methods |", "|---|---|"]
    return "\n".join([*lines, *(f"| {where} | {', '.join(f'`{n}`' for n in sorted(some))} |" for where, some in rows)])


def foreign_table() -> str:
    """FOREIGN as a table of Markdown, rows that differ in their names alone as one."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for one in FOREIGN:
        rows.setdefault((one.kind, one.on, one.purpose, one.until), []).append(f"`{one.name}`" if one.name else "")
    lines = ["| on | what | for | until |", "|---|---|---|---|"]
    for (kind, on, purpose, until), names in rows.items():
        lines.append(f"| {on} | {' '.join([kind, ', '.join(names)]).strip()} | {purpose} | {until} |")
    return "\n".join(lines)


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of block `name` exchanged."""
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no block {name!r}: put <!-- begin {name} --> and <!-- end {name} --> there")
    return pattern.sub(lambda m: m.group(1) + content + "\n" + m.group(2), text)


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    out = {
        ROOT / "docs" / "methods.md": methods_page(),
        ROOT / "docs" / "reference.md": reference_page(list(models().values())),
    }
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    demo = RESULTS / "demo.json"
    if demo.exists():
        text = replace_block(text, "demo table", cells_table(json.loads(demo.read_text(encoding="utf-8"))))
    text = replace_block(text, "methods", methods_block())
    out[readme] = text
    contributing = ROOT / "CONTRIBUTING.md"
    out[contributing] = replace_block(contributing.read_text(encoding="utf-8"), "layers", layers_table().rstrip("\n"))
    architecture = ROOT / "docs" / "architecture.md"
    out[architecture] = replace_block(architecture.read_text(encoding="utf-8"), "foreign", foreign_table())
    page = ROOT / "docs" / "decoder.md"
    out[page] = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        if (results := RESULTS / f"{name}.json").exists():
            data = json.loads(results.read_text(encoding="utf-8"))
            out[page] = replace_block(out[page], name, table(data))
    out[report.PAGE] = report.page()
    census = RESULTS / "census.json"
    if census.exists():
        data = json.loads(census.read_text(encoding="utf-8"))
        out[ROOT / "docs" / "support.md"] = support_page(data)
        out[readme] = replace_block(out[readme], "support", numbers(data))
    serving = ROOT / "docs" / "serving.md"
    out[serving] = serving.read_text(encoding="utf-8")
    for name, table in (("serving_load", load_table), ("serving_clips", clips_table)):
        if (result := RESULTS / f"{name}.json").exists():
            out[serving] = replace_block(out[serving], name, table(json.loads(result.read_text(encoding="utf-8"))))
    zoo = RESULTS / "zoo.json"
    if zoo.exists():
        data = json.loads(zoo.read_text(encoding="utf-8"))
        out[ROOT / "docs" / "zoo.md"] = (
            "# All connector methods on the demo VLM\n\nMade by `make docs` from benchmarks/results/zoo.json, whose "
            "cells name their commits; do not edit.\nRandom and uniform stand beside every method; a method below "
            "random is marked, not hidden. `explain` alone was trained for this model. The smaller picture "
            "(`resize`) has no row:\nthis model's processor makes 256 tokens of a picture of any size; `pool` is the "
            "nearest thing.\n\n" + cells_table(data, times=False) + "\n\n" + types_table(data) + "\n"
        )
    return out


def types_table(data: dict[str, Any]) -> str:
    """Accuracy by question type at the ratio nearest to 10 %."""
    ratio = min({c["ratio"] for c in data["cells"] if c["method"] != "none"}, key=lambda r: abs(r - 0.1))
    rows = [c for c in data["cells"] if c["method"] == "none" or c["ratio"] == ratio]
    types = list(rows[0]["per_type"])
    lines = [
        f"## By question type at {ratio:.0%}",
        "",
        "| method | " + " | ".join(types) + " |",
        "|---|" + "---:|" * len(types),
    ]
    for c in rows:
        name = "all tokens" if c["method"] == "none" else f"`{c['method']}`"
        lines.append(f"| {name} | " + " | ".join(f"{c['per_type'][t]:.0%}" for t in types) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    check = parser.parse_args().check
    stale = [p for p, text in pages().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.write_text(pages()[path], encoding="utf-8")
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}")
    if check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
