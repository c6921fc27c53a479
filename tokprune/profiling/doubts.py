"""Where pruning does not pay, and why: launch-bound, tower-bound, decode-bound, or eaten by the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokprune.profiling.report import ProfileReport, RunResult

PAYS = 1.1
"""Speed-up of the whole from which on pruning pays."""
HINTS = {
    "tower-bound": "the vision tower sees the whole picture before anything is dropped; prune inside it (encoder "
    "stage) or take a smaller picture",
    "decode-bound": "each new token reads all weights, however short the prompt; expect a gain with shorter answers, "
    "longer prompts or larger batches",
    "launch-bound": "its operations take as long to launch, and its weights to read, for few tokens as for many; batch "
    "more prompts, compile, or leave the picture whole",
    "choice-bound": "the choice costs what it saves; take a cheaper method or a larger LLM",
}
"""What each reason means, and what to do."""


def doubts(report: ProfileReport) -> list[str]:
    """A sentence for each pruned run that is not PAYS times as fast as the plain one in all: what it was bound by."""
    plain = report.find("plain")
    if plain is None:
        return []
    out = []
    for cell in report.cells:
        faster = report.speedup(cell) or 0.0
        if cell.kind == "pruned" and faster < PAYS:
            reason, share = bound(plain, cell)
            told = f"{cell.name} hardly pays, {faster:.2f} x in all: {reason}, {share:.0%} of the pruned run"
            out.append(f"{told}; {HINTS[reason]}")
    return out


def bound(plain: RunResult, cell: RunResult) -> tuple[str, float]:
    """What a pruned run waits for longest, and its share of the run. A prefill counts where it shrank less than half as
    much as its prompt did."""
    took = {name: cell.times[name].median for name in cell.times}
    parts = {
        "tower-bound": took["vision"] + took["projector"],
        "decode-bound": took["decode"],
        "choice-bound": took["select"] - plain.times["select"].median,
    }
    columns = cell.prompt / max(plain.prompt, 1)
    if took["prefill"] > (1 + columns) / 2 * plain.times["prefill"].median:
        parts["launch-bound"] = took["prefill"]
    reason = max(parts, key=parts.__getitem__)
    return reason, parts[reason] / max(took["total"], 1e-9)
