"""Which tasks there are, by name, before anything runs: our offline ones, lmms-eval's, and those of a user's folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokprune.errors import OptionError
from tokprune.evaluation import task_folder
from tokprune.loading import check_reachable
from tokprune.types import JsonObject

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

SUGGESTED = 5


def task_manager(tasks: Sequence[str], folders: Sequence[str | Path] = (), prompts: str | None = None) -> TaskManager:
    """lmms-eval's TaskManager for these tasks; raises OptionError, with the nearest names, for one that is not there.

    folders: more places with task YAMLs. prompts: whose wording of the questions, a model name of lmms-eval such as
    qwen3_vl. lmms-eval's own index takes some eight seconds; it is read only if a task is not found without.
    """
    from lmms_eval.tasks import TaskManager

    for folder in folders:
        if not Path(folder).is_dir():
            raise OptionError(f"--include-path {folder} is not a folder; give one that holds task YAML files.")
    paths = [str(Path(p).resolve()) for p in (task_folder(), *folders) if Path(p).is_dir()]
    manager = TaskManager("ERROR", paths, include_defaults=False, model_name=prompts)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager("ERROR", paths, include_defaults=True, model_name=prompts)
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown_task(task, manager.all_tasks)
    for data_set in dict.fromkeys(name for task in tasks for name in data_sets(manager, task)):
        check_reachable(data_set, kind="dataset")  # a load retries for minutes before it says so
    return manager


def data_sets(manager: TaskManager, task: str) -> list[str]:
    """The data sets of the hub that a task, or the tasks of a group, read; none where its YAML does not say."""
    entry = manager.task_index.get(task, {})
    if isinstance(entry.get("task"), list):  # a tag: the names of its tasks
        return [name for part in entry["task"] for name in data_sets(manager, str(part))]
    if not isinstance(entry.get("yaml_path"), str):
        return []
    config = _config(Path(entry["yaml_path"]))
    path, parts = config.get("dataset_path"), config.get("task")
    names = [path] if isinstance(path, str) and path.count("/") == 1 and not Path(path).exists() else []
    for part in parts if isinstance(parts, list) else ():
        name = part.get("task") if isinstance(part, Mapping) else part
        names += data_sets(manager, str(name)) if name != task else []
    return names


def _config(file: Path) -> JsonObject:
    """A task's YAML with what it includes, its functions left alone."""
    from lmms_eval.utils import load_yaml_config

    config: JsonObject = load_yaml_config(str(file), mode="simple")
    included = config.get("include")
    return {**(_config(file.parent / included) if isinstance(included, str) else {}), **config}


def unknown_task(task: str, known: Iterable[str]) -> OptionError:
    """The error for a task that does not exist: the nearest of some two thousand names."""
    known = list(known)
    close = difflib.get_close_matches(task.lower(), known, n=SUGGESTED, cutoff=0.5)
    parts = [k for k in known if task.lower() in k.lower() or k.lower() in task.lower()]
    near = list(dict.fromkeys([*close, *parts]))[:SUGGESTED]
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return OptionError(f"unknown task {task!r}.{hint} `lmms_eval --tasks list` prints all names.")
