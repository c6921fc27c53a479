"""Reads what lmms-eval returns: which metric to show, how each question scored, what each answer cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tokprune.evaluation.cells import Cell, CellResult, Sample
from tokprune.evaluation.errors import EvaluationError
from tokprune.evaluation.lmms_meter import SampleRecord, averages
from tokprune.evaluation.table import FLOPS, KEPT, TOTAL, TTFT
from tokprune.types import Fields

#: Fields of a per-question dict that hold its score, and pairs whose equality is the score, as lmms-eval's tasks name
# them.
SCORE_FIELDS = ("score", "correct", "is_correct", "accuracy", "acc", "exact_match")
ANSWER_PAIRS = (
    ("pred_answer", "gt_answer"),
    ("pred_answer", "answer"),
    ("parsed_pred", "answer"),
    ("prediction", "ground_truth"),
    ("pred", "answer"),
    ("pred", "ground_truth"),
)
#: What the model measures of each answer, and the names it gets here; times go to timing.
COSTS = {
    "kept_tokens": KEPT,
    "total_tokens": TOTAL,
    "prompt_tokens": "prompt_tokens",
    "new_tokens": "new_tokens",
    "flops": FLOPS,
}
TIMES = {
    "ttft_ms": TTFT,
    "prefill_ms": "prefill_ms",
    "vision_ms": "vision_ms",
    "select_ms": "select_ms",
    "total_ms": "answer_ms",
}


def score_of(value: object) -> float | None:
    """The score of one question from what a task's process_results gave for a metric; None where it is no number."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Mapping):
        for name in SCORE_FIELDS:
            if isinstance(value.get(name), bool | int | float):
                return float(value[name])
        for said, expected in ANSWER_PAIRS:
            if isinstance(value.get(said), str | int) and isinstance(value.get(expected), str | int):
                return float(str(value[said]).strip().lower() == str(value[expected]).strip().lower())
    return None


def metrics_of(entry: Fields) -> dict[str, float]:
    """The aggregated numbers of a task: "exact_match,none" becomes "exact_match"; standard errors are left out."""
    numbers: dict[str, float] = {}
    for name, value in entry.items():
        metric, _, kind = name.partition(",")
        if kind and isinstance(value, bool | int | float) and "_stderr" not in metric:
            numbers.setdefault(metric, float(value))
    return numbers


def main_metric(config: Fields, metrics: Mapping[str, float]) -> str:
    """The metric to show: the task's score_key, else the first of its metric_list that is a number."""
    listed = [m.get("metric") for m in config.get("metric_list") or [] if isinstance(m, Mapping)]
    for name in [config.get("score_key"), *listed, *metrics]:
        if name in metrics:
            return str(name)
    raise EvaluationError(
        f"task {config.get('task')!r} gave no number: its metrics are {', '.join(map(str, listed)) or 'none'}. Tasks "
        f"that only write a file for a test server cannot be compared; choose their validation split."
    )


def samples_of(
    samples: Mapping[str, Sequence[Fields]], metrics: Sequence[str], records: Sequence[SampleRecord]
) -> tuple[Sample, ...]:
    """The questions of a cell in the order of tasks and rows; of several answer filters the first one counts."""
    costs = {(r.task, r.doc_id): r.to_dict() for r in records}
    out: dict[tuple[str, int], Sample] = {}
    for task in sorted(samples):
        for row in sorted(samples[task], key=lambda r: int(r["doc_id"])):
            at = (task, int(row["doc_id"]))
            if at in out:
                continue
            scores = {m: s for m in metrics if (s := score_of(row.get(m))) is not None}
            measured = costs.get(at, {})
            paid = {new: float(measured[old]) for old, new in COSTS.items() if old in measured}
            out[at] = Sample(*at, _text(row.get("filtered_resps")), _text(row.get("target")), scores, paid)
    return tuple(out.values())


def cell_result(cell: Cell, output: Fields, records: Sequence[SampleRecord]) -> CellResult:
    """The result of a cell from lmms-eval's results and the model's records.

    A group without an aggregate of its own (such as mvbench) gets the mean over its tasks of their main metric.
    """
    configs, results = output["configs"], output["results"]
    leaves = sorted(output["samples"])
    by_task = {task: metrics_of(results.get(task, {})) for task in leaves}
    for task in leaves:
        if not by_task[task]:
            raise EvaluationError(f"task {task!r} gave no number that can be compared; was a row left to score?", task)
    mains = {task: main_metric(configs[task], by_task[task]) for task in leaves}
    whole = metrics_of(results.get(cell.task, {}))
    if cell.task in by_task:
        main = mains[cell.task]
    elif whole:
        main = next((m for m in mains.values() if m in whole), next(iter(whole)))
    else:
        main = mains[leaves[0]]
        whole = {main: sum(by_task[t][mains[t]] for t in leaves) / len(leaves)}
    if len(leaves) > 1:
        whole |= {f"{task}/{mains[task]}": by_task[task][mains[task]] for task in leaves}
    names = dict.fromkeys(m for task in leaves for m in by_task[task])
    better = output.get("higher_is_better", {}).get(leaves[0], {}).get(main)
    samples = samples_of(output["samples"], list(names), records)
    return CellResult(
        cell=cell,
        metrics=whole,
        main=main,
        samples=samples,
        higher_is_better=better is not False,
        costs=averages(records, COSTS),
        timing=averages(records, TIMES),
        versions={task: output["versions"].get(task) for task in leaves},
    )


def _text(value: object) -> str:
    """An answer or target as text; a list of one is that one."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
