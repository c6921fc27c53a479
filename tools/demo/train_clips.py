"""Train the clip model from the image model: `python -m tools.demo.train_clips --out DIR`.

Stages, in order: takes (draw, H.264, features of the image model's tower), align (projector), answer and refine
(projector and Llama, two turns of the learning rate), export (files), evaluate (mp4 files through decoder, processor
and generate). About half an hour of two free CPU cores.

As in `tools.demo.train`, a finished stage is not run again and a killed one continues from its last checkpoint. To ship
a new model, use `--export-to tokprune/demo/weights_clips`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .clips_align import train_clip_align
from .clips_data import cache_takes
from .clips_export import export_clips
from .clips_qa import train_clips
from .clips_recipe import ClipRecipe
from .clips_report import evaluate_clips
from .train import run_actions
from .workers import launch

STAGES: tuple[str, ...] = ("takes", "align", "answer", "refine", "export", "evaluate")


def run(
    out: Path,
    recipe: ClipRecipe | None = None,
    stages: Sequence[str] = STAGES,
    workers: int = 2,
    export_to: Path | None = None,
) -> None:
    """Run the wanted stages that are not done yet; arguments as in `tools.demo.train.run`."""
    recipe = recipe or ClipRecipe()
    export_to = export_to or out / "model"

    def takes() -> None:
        for split in ("train", "validation"):
            launch(cache_takes, workers, out, split, recipe)

    actions: dict[str, Callable[[], None]] = {
        "takes": takes,
        "align": lambda: launch(train_clip_align, workers, out, recipe),
        "answer": lambda: launch(train_clips, workers, out, recipe, "answer"),
        "refine": lambda: launch(train_clips, workers, out, recipe, "refine"),
        "export": lambda: export_clips(out, recipe, export_to),
        "evaluate": lambda: launch(evaluate_clips, 1, out, recipe, export_to),
    }
    run_actions(actions, out, recipe, stages, workers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.train_clips", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder (half a gigabyte)")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="only these stages (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="CPU processes (default: 2); CUDA uses one")
    parser.add_argument("--export-to", type=Path, help="folder for the model files (default: OUT/model)")
    options = parser.parse_args(arguments)
    run(options.out, stages=options.stage, workers=options.workers, export_to=options.export_to)


if __name__ == "__main__":
    main()
