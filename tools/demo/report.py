"""Stage "evaluate": accuracy of the exported files by the real path, and one JSON about the whole run."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from tokprune import demo
from tokprune.demo.scenes import held_out
from tools.demo.evaluation import accuracy, correct

from .recipe import Recipe
from .workers import Worker

_OPTIMISED = ("dense", "clip", "align", "qa")
_LOG_POINTS = 12  # per stage
_CONDITIONS: dict[str, Literal["own", "none", "wrong"]] = {
    "all_tokens": "own",
    "no_image": "none",
    "wrong_image": "wrong",
}


def evaluate_export(worker: Worker, out: Path, recipe: Recipe, folder: Path) -> None:
    """Measure the exported model with its own image, with none and with a wrong one; write `out/report.json`."""
    started = time.perf_counter()
    model, processor = demo.load(worker.device, folder=folder)
    examples = held_out(recipe.evaluation_questions)
    results: dict[str, dict[str, float]] = {}
    for condition, seen in _CONDITIONS.items():
        shares = accuracy(examples, correct(model, processor, examples, seen=seen))
        results[condition] = {name: round(share, 4) for name, share in shares.items()}
        print(condition, json.dumps(results[condition]), flush=True)
    stages = {
        stage: stage_report(out, stage, stage in _OPTIMISED)
        for stage in ("render", "dense", "clip", "cache", "align", "qa", "export")
    }
    report = {
        "about": "Training of the demo VLM in tokprune/demo/weights, and its accuracy on held-out scenes.",
        "command": "python -m tools.demo.train --out DIR",
        "machine": machine(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "recipe": dataclasses.asdict(recipe),
        "seeds": {"training": recipe.seed, "held_out": 0},
        "held_out_questions": len(examples),
        "held_out_scenes": len({example.scene.seed for example in examples}),
        "held_out_accuracy": results,
        "evaluation_path": "chat template, LlavaProcessor, generate(); exact match of the generated word",
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "model_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "stages": stages,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def stage_report(out: Path, stage: str, optimised: bool = True) -> dict[str, Any]:
    """Wall seconds, and for an optimised stage a thinned log with the final validation."""
    done = json.loads((out / f"{stage}.json").read_text(encoding="utf-8"))
    if not optimised:
        return {"seconds": done["seconds_of_last_start"], "workers": done["workers"]}
    lines = (out / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    log = [entry for entry in entries if "validation" not in entry]
    every = -(-len(log) // _LOG_POINTS)
    validated: dict[str, Any] = next(
        (entry for entry in entries if "validation" in entry), {}
    )  # not there when it was stopped early
    validation = {k: v for k, v in validated.items() if k not in ("step", "validation")}
    return {
        "seconds": log[-1]["seconds"],  # summed over restarts
        "cpu_seconds_per_worker": log[-1]["cpu_seconds"],
        "workers": done["workers"],
        "validation": validation,
        "log": log[::-1][::every][::-1],
    }


def machine() -> str:
    """The processor or GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()}-core CPU, no GPU"
