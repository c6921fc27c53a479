"""Which tasks there are, by name, before anything runs: our offline ones, lmms-eval's, and those of a user's folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokprune.errors import OptionError
from tokprune.evaluation import task_folder

SUGGESTED = 5


def task_manager(tasks: Sequence[str], folders: Sequence[str | Path] = (), prompts: str | None = None) -> Any:
    """lmms-eval's TaskManager for these tasks; raises OptionError, with the nearest names, for one that is not there.

    folders: more places with task YAMLs. prompts: whose wording of the questions, a model name of lmms-eval such as qwen3_vl.
    lmms-eval's own index takes some eight seconds; it is read only if a task is not found without.
    """
    from lmms_eval.tasks import TaskManager

    for folder in folders:
        if not Path(folder).is_dir():
            raise OptionError(f"--include-path {folder} is not a folder; give one that holds task YAML files.")
    paths = [str(Path(p).resolve()) for p in (task_folder(), *folders) if Path(p).is_dir()]
    manager = TaskManager("ERROR", paths, include_defaults=False, model_name=prompts)
    if set(tasks) <= set(manager.all_tasks):
        return manager
    manager = TaskManager("ERROR", paths, include_defaults=True, model_name=prompts)
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown_task(task, manager.all_tasks)
    return manager


def unknown_task(task: str, known: Iterable[str]) -> OptionError:
    """The error for a task that does not exist: the nearest of some two thousand names."""
    known = list(known)
    close = difflib.get_close_matches(task.lower(), known, n=SUGGESTED, cutoff=0.5)
    parts = [k for k in known if task.lower() in k.lower() or k.lower() in task.lower()]
    near = list(dict.fromkeys([*close, *parts]))[:SUGGESTED]
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return OptionError(f"unknown task {task!r}.{hint} `lmms_eval --tasks list` prints all names.")
