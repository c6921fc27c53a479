"""docs/reference.md: every published number that the package holds, with its source."""

from __future__ import annotations

from collections.abc import Sequence

from tokprune.evaluation.reference import Model, to_text
from tokprune.evaluation.reference.tables import Benchmark

HEAD = """\
# Published numbers

Made by `make docs` from the files in tokprune/evaluation/reference; do not edit. `tokprune eval --reference` prints
them, `--model llava-1.5-7b`, `--methods`, `--tasks` choose; with a checkpoint and tasks of these tables it runs and
sets your numbers beside them.

None of these numbers was measured by us. They were read from papers, project pages, repositories and third parties'
notes of them, as each table says. **Compare within one table only**: sources differ in prompts, metrics and how they
count tokens, and one name may be several points apart between them (FastV on POPE with 192 tokens: 64.8, 79.2 and
75.8).
"""


def reference_page(models: Sequence[Model]) -> str:
    """docs/reference.md."""
    used = {b.name: b for m in models for t in m.tables for b in t.benchmarks if b.task}
    out = [HEAD, "## Benchmarks and tasks", "", "| column | lmms-eval task | metric | remark |", "|---|---|---|---|"]
    out += [_benchmark_line(b) for b in sorted(used.values(), key=lambda b: b.name.lower())]
    out += [
        "",
        "Other columns name their unit. `average%` is the mean share of the full model's score over the benchmarks of "
        "a paper.",
        "",
    ]
    return "\n".join(out) + "\n" + to_text(models).rstrip() + "\n"


def _benchmark_line(b: Benchmark) -> str:
    factor = "" if b.scale == 1 else f" × {b.scale:g}"
    return f"| {b.name} | `{b.task}` | {' + '.join(f'`{m}`' for m in b.metrics)}{factor} | {b.note} |"
