"""Are the pictures of the offline tasks needed? Accuracy with the own picture, with another row's, and without any.

    python benchmarks/offline_controls.py --json benchmarks/results/offline_controls.json
    python benchmarks/offline_controls.py --questions 70 --tasks tokprune_scenes

Runs lmms-eval with the demo VLM, unpruned, offline. `constant` needs no model: always the most frequent answer of a
type. A benchmark that measures what pruning loses has its own pictures far above the other three, type by type.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = 420  # per task and control: a multiple of both tasks' numbers of types
CONTROLS = ("own", "shuffled", "no_image")
BATCH = 14


def run_task(task: str, control: str, questions: int, device: str, manager: Any) -> tuple[dict[str, float], list[Any]]:
    """Scores of one task under one control, and its samples."""
    from lmms_eval.evaluator import simple_evaluate

    from tokprune.evaluation.lmms_model import TokpruneChat

    model = TokpruneChat(
        pretrained="demo", device=device, batch_size=BATCH, flops_samples=0, control="" if control == "own" else control
    )
    found = simple_evaluate(
        model=model, tasks=[task], task_manager=manager, limit=questions, bootstrap_iters=0, log_samples=True
    )
    scores = {
        name.split(",")[0]: round(float(value), 4)
        for name, value in found["results"][task].items()
        if "," in name and "stderr" not in name and isinstance(value, int | float)
    }
    return scores, found["samples"][task]


def constant(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What always giving the most frequent answer of each type scores."""
    answers: dict[str, list[str]] = {}
    for s in samples:
        answers.setdefault(s["doc"]["type"], []).append(s["target"])
    shares = {kind: Counter(a).most_common(1)[0][1] / len(a) for kind, a in sorted(answers.items())}
    right = sum(share * len(answers[kind]) for kind, share in shares.items())
    scores = {"accuracy": right / len(samples), "macro": sum(shares.values()) / len(shares), **shares}
    return {name: round(value, 4) for name, value in scores.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    from tokprune.evaluation import OFFLINE_TASKS, task_folder

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(OFFLINE_TASKS))
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="per task, from the first on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    args = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before lmms-eval and datasets are imported
    found: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_HOME"] = cache
        from lmms_eval.tasks import TaskManager

        manager = TaskManager("ERROR", str(task_folder()), include_defaults=False, model_name="tokprune")
        for task in args.tasks.split(","):
            for control in CONTROLS:
                scores, samples = run_task(task, control, args.questions, args.device, manager)
                found.setdefault(task, {})[control] = scores
            found[task]["constant"] = constant(samples)
            found[task]["questions"] = len(samples)
    for task, controls in found.items():
        print(f"{task}, {controls['questions']} questions")
        for control in (*CONTROLS, "constant"):
            print(f"  {control:10}", "  ".join(f"{k} {100 * v:.1f}" for k, v in controls[control].items()))
    if args.json:
        from tokprune.environment import environment

        data = {
            "type": "tokprune.OfflineControls",
            "version": 1,
            "command": f"python benchmarks/offline_controls.py --questions {args.questions} --tasks {args.tasks}",
            "environment": environment(args.device),
            "seconds": round(time.perf_counter() - started),
            "tasks": found,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
