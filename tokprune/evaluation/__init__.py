"""Accuracy on benchmarks: the lmms-eval plug-in, offline tasks, and what runs them.

    lmms_eval --model tokprune --model_args pretrained=demo,method=divprune,ratio=0.1 \
        --include_path "$(python -c 'import tokprune.evaluation as e; print(e.task_folder())')" --tasks tokprune_scenes

Importing this package does not import lmms-eval, which takes ten seconds and changes global state.
"""

from __future__ import annotations

from pathlib import Path

from tokprune.evaluation.errors import EvaluationError

__all__ = ["OFFLINE_TASKS", "EvaluationError", "task_folder"]

#: Tasks whose data lie in the package.
OFFLINE_TASKS: tuple[str, ...] = ("tokprune_scenes", "tokprune_clips")


def task_folder() -> Path:
    """The folder with the offline tasks, for lmms-eval's --include_path."""
    return Path(__file__).parent / "tasks"
