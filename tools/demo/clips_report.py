"""Stage "evaluate" of the clip model: accuracy of the exported files on real mp4 files, and one JSON about the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from tokprune import demo
from tokprune.demo.clips import ClipExample, held_out_clips
from tokprune.demo.clips_questions import MOMENT_TYPES
from tools.demo.evaluation import accuracy, correct

from .clips_recipe import ClipRecipe
from .report import machine, stage_report
from .workers import Worker

_CONDITIONS: dict[str, Literal["own", "none", "grey", "wrong"]] = {
    "all_tokens": "own",
    "no_video": "none",
    "grey_frames": "grey",
    "wrong_video": "wrong",
}


def evaluate_clips(worker: Worker, out: Path, recipe: ClipRecipe, folder: Path) -> None:
    """Measure the exported model with its own clip, with none and with a wrong one; write `out/report.json`."""
    import av

    started = time.perf_counter()
    model, processor = demo.load_clips(worker.device, folder=folder)
    sets = {
        "short": held_out_clips(recipe.evaluation_questions, 0, out / "clips"),
        "long": held_out_clips(recipe.evaluation_long_questions, 0, out / "clips", long=True, types=MOMENT_TYPES),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, examples in sets.items():
        results[name] = _about(examples)
        for condition, seen in _CONDITIONS.items():
            hits = correct(model, processor, examples, seen=seen)
            results[name][condition] = _rounded(accuracy(examples, hits))
            if condition == "all_tokens" and name == "short":
                results[name]["all_tokens_in_detail"] = _rounded(_in_detail(examples, hits))
            print(name, condition, json.dumps(results[name][condition]), flush=True)
    stages = {
        "takes": stage_report(out, "takes", optimised=False),
        "align": stage_report(out, "align"),
        "answer": stage_report(out, "answer"),
        "refine": stage_report(out, "refine"),
        "export": stage_report(out, "export", optimised=False),
    }
    report = {
        "about": "Training of the clip model in tokprune/demo/weights_clips, and its accuracy on held-out mp4 files.",
        "command": "python -m tools.demo.train_clips --out DIR",
        "machine": machine(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "av": av.__version__,
        },
        "recipe": dataclasses.asdict(recipe),
        "seeds": {"training": recipe.seed, "held_out": 0},
        "held_out": results,
        "evaluation_path": "mp4 (H.264), read_video, chat template, LlavaNextVideoProcessor, generate(); exact match "
        "of the word",
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "model_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "stages": stages,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


_DETAILS = {  # a word of the question, and what the questions with it are about
    " after ": "order, after",
    " before ": "order, before",
    " first ": "order, first",
    " last ": "order, last",
    "many scenes": "count, scenes",
    " objects ": "count, of a color",
    " shapes ": "count, of a shape",
}


def _in_detail(examples: Sequence[ClipExample], hits: Sequence[bool]) -> dict[str, float]:
    """Share of right answers by what exactly is asked about order and counts."""
    by_kind: defaultdict[str, list[bool]] = defaultdict(list)
    for example, hit in zip(examples, hits, strict=True):
        for word, kind in _DETAILS.items():
            if word in example.question:
                by_kind[kind].append(hit)
    return {f"{kind} ({len(found)} questions)": sum(found) / len(found) for kind, found in sorted(by_kind.items())}


def chance(examples: Sequence[ClipExample]) -> dict[str, float]:
    """Share of the most frequent answer of each type: what a constant answer per type gets, and the mean ("macro")."""
    shares: dict[str, float] = {}
    for kind in dict.fromkeys(e.type for e in examples):
        answers = [e.answer for e in examples if e.type == kind]
        shares[kind] = max(map(answers.count, answers)) / len(answers)
    return {**shares, "macro": sum(shares.values()) / len(shares)}


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in shares.items()}


def _about(examples: Sequence[ClipExample]) -> dict[str, Any]:
    """What a set of questions is, and what a constant answer per type would get."""
    shares = chance(examples)
    return {
        "questions": len(examples),
        "clips": len({example.path for example in examples}),
        "frames_read": examples[0].frames,
        "chance": _rounded(shares),
    }
