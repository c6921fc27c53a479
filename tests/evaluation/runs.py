"""A stand-in for lmms-eval in the tests of the sweep: answers follow from the cell alone, so that any order gives the
same."""

from __future__ import annotations

import hashlib

from tokprune.evaluation.cells import Cell, CellResult, Sample
from tokprune.evaluation.table import FLOPS, KEPT, TOTAL, TTFT

QUESTIONS = 40
ENVIRONMENT = {
    "tokprune": "0.1.0",
    "commit": "abc",
    "torch": "2",
    "transformers": "5",
    "lmms_eval": "0.7.3",
    "machine": "test",
}


def draw(*what: object) -> float:
    """A number in [0, 1) that only depends on `what`."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big") / 2**32


def run_cell(cell: Cell, graded: bool = False) -> CellResult:
    """Easy questions stay right; hard ones are lost as the ratio falls, faster by `random`."""
    strength = 0.0 if cell.baseline else (1 - cell.ratio) * (0.8 if cell.method == "random" else 0.3)
    samples = []
    for i in range(QUESTIONS):
        right = draw(cell.task, i) > 0.1 and draw(cell.task, i, "hard") > strength
        score = 0.5 + 0.5 * draw(cell, i) if graded and right else float(right)
        samples.append(
            Sample(cell.task, i, "red" if right else "blue", "red", {"accuracy": score}, {KEPT: 256 * cell.ratio})
        )
    mean = sum(s.scores["accuracy"] for s in samples) / QUESTIONS
    return CellResult(
        cell,
        {"accuracy": mean},
        "accuracy",
        tuple(samples),
        costs={KEPT: 256 * cell.ratio, TOTAL: 256.0, FLOPS: 1e9 * (0.5 + cell.ratio)},
        timing={TTFT: 10 * cell.ratio},
    )
