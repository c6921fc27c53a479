"""Train the demo VLM from nothing: `python -m tools.demo.train --out DIR`.

Stages, in order: render (draw the scenes), dense (patches learn attributes and positions), clip ([CLS] and a text
tower), cache (features of the frozen tower), align (projector), qa (projector and Llama), export (files for
from_pretrained), evaluate (through processor and generate). The recipe takes about half an hour of two free CPU cores.

Everything but the exported model stays in DIR. A finished stage is not run again; a killed one continues from its last
checkpoint. Delete `DIR/<stage>.json` (and `DIR/<stage>.checkpoint`) to repeat a stage. To ship a new model, use
`--export-to tokprune/demo/weights`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .align import train_align
from .clip import train_clip
from .data import render_split
from .dense import train_dense
from .export import export
from .features import cache_features
from .qa import train_qa
from .recipe import Recipe
from .report import evaluate_export
from .workers import launch

STAGES: tuple[str, ...] = ("render", "dense", "clip", "cache", "align", "qa", "export", "evaluate")


def run(
    out: Path,
    recipe: Recipe | None = None,
    stages: Sequence[str] = STAGES,
    workers: int = 2,
    export_to: Path | None = None,
) -> None:
    """Run the wanted stages that are not done yet.

    Args:
        out: working folder; several gigabytes with the default recipe.
        recipe: sizes, steps and seeds; one folder serves one recipe.
        stages: names out of `STAGES`; they run in the order of `STAGES`.
        workers: CPU processes of one thread each (ignored on a CUDA device). It multiplies the batch.
        export_to: where the model files go; by default `out/model`.
    """
    recipe = recipe or Recipe()
    export_to = export_to or out / "model"
    actions: dict[str, Callable[[], None]] = {
        "render": lambda: _both_splits(render_split, workers, out, recipe),
        "dense": lambda: launch(train_dense, workers, out, recipe),
        "clip": lambda: launch(train_clip, workers, out, recipe),
        "cache": lambda: _both_splits(cache_features, workers, out, recipe),
        "align": lambda: launch(train_align, workers, out, recipe),
        "qa": lambda: launch(train_qa, workers, out, recipe),
        "export": lambda: export(out, recipe, export_to),
        "evaluate": lambda: launch(evaluate_export, 1, out, recipe, export_to),
    }
    run_actions(actions, out, recipe, stages, workers)


def run_actions(
    actions: Mapping[str, Callable[[], None]], out: Path, recipe: Any, stages: Sequence[str], workers: int
) -> None:
    """Run those of the actions, in their order, that are wanted and not done yet.

    Args:
        actions: every stage by name; it is done when `out/<name>.json` is there, which is written after it.
        recipe: a dataclass; one folder serves one.
        stages: the wanted names.
        workers: only noted.
    """
    if unknown := [stage for stage in stages if stage not in actions]:
        raise ValueError(f"unknown stage {unknown[0]!r}; choose from {', '.join(actions)}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, recipe)
    names = list(actions)
    for stage in names:
        done = out / f"{stage}.json"
        if stage not in stages or done.exists():
            continue
        missing = [s for s in names[: names.index(stage)] if not (out / f"{s}.json").exists()]
        if missing:
            raise RuntimeError(f"stage {stage!r} needs {missing[0]!r} first; run it with --stage {missing[0]}")
        started = time.perf_counter()
        actions[stage]()
        _write_json(done, {"workers": workers, "seconds_of_last_start": round(time.perf_counter() - started, 1)})


def _claim(out: Path, recipe: Any) -> None:
    """Refuse a folder that belongs to another recipe: its checkpoints would not fit."""
    path, wanted = out / "recipe.json", json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not path.exists():
        _write_json(path, wanted)
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        different = sorted(key for key in wanted if wanted[key] != found.get(key))
        raise RuntimeError(
            f"{out} holds a run with another recipe (differs in {', '.join(different)}); use a new folder"
        )


def _write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _both_splits(function: Callable[..., None], workers: int, out: Path, recipe: Recipe) -> None:
    for split in ("train", "validation"):
        launch(function, workers, out, split, recipe)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder (a few gigabytes)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="only these stages (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="CPU processes (default: 2); CUDA uses one")
    parser.add_argument("--export-to", type=Path, help="folder for the model files (default: OUT/model)")
    options = parser.parse_args(arguments)
    run(options.out, stages=options.stage, workers=options.workers, export_to=options.export_to)


if __name__ == "__main__":
    main()
