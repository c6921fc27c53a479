"""The loop around every optimisation stage: schedule, log, checkpoints, restart."""

from __future__ import annotations

import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .optimizer import MixedOptimizer, cosine
from .recipe import StageRecipe
from .workers import Worker

Metrics = dict[str, float]


def save(value: Any, path: Path) -> None:
    """Write with torch.save so that a kill never leaves half a file behind."""
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def load(path: Path) -> Any:
    """Read what `save` wrote."""
    return torch.load(path, map_location="cpu", weights_only=True)


def batch_indices(step: int, batch: int, total: int, seed: int, worker: Worker) -> np.ndarray:
    """Which scenes a worker sees in a step: a pure function of its arguments, so that a restart needs no state."""
    per_epoch = max(1, total // (batch * worker.count))
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(total)
    start = (place * worker.count + worker.rank) * batch
    return np.take(order, range(start, start + batch), mode="wrap")


def run_stage(
    name: str,
    out: Path,
    recipe: StageRecipe,
    optimizer: MixedOptimizer,
    compute: Callable[[int, random.Random], tuple[Tensor, Metrics]],
    validate: Callable[[], Metrics],
    worker: Worker,
    seed: int,
) -> dict[str, Tensor]:
    """Train to the end of the stage, from the last checkpoint if there is one.

    Args:
        compute: `(step, rng)` to the loss and what to log; it must draw all its chance from `rng` and torch's
        generator.
        validate: measures on scenes that are not trained on; called once, on the first worker, at the end.

    Returns:
        The float32 weights by name. They are also in `out/<name>.pt`, with the log in `out/<name>.jsonl`.
    """
    checkpoint = out / f"{name}.checkpoint"
    first, seconds, cpu_seconds = 0, 0.0, 0.0
    if checkpoint.exists():
        state = load(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
    if worker.is_first:
        _forget_after(out / f"{name}.jsonl", first)
    started, cpu_started = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    recent: defaultdict[str, list[float]] = defaultdict(list)
    for step in range(first, recipe.steps):
        torch.manual_seed((seed * 1009 + step) * 64 + worker.rank)
        loss, metrics = compute(step, random.Random(f"{name} {seed} {step} {worker.rank}"))
        loss.backward()
        norm = optimizer.step(cosine(step, recipe.steps, recipe.warmup))
        for key, value in {"loss": float(loss.detach()), "grad_norm": norm, **metrics}.items():
            recent[key].append(value)
        done = step + 1
        if worker.is_first and (done % recipe.log_every == 0 or done == recipe.steps):
            clock = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
            _log(out / f"{name}.jsonl", {"step": done, **clock, **_means(recent)})
            recent.clear()
        if worker.is_first and (done % recipe.save_every == 0 or done == recipe.steps):
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            state = {"step": done, "seconds": seconds, "cpu_seconds": cpu_seconds}
            save({"optimizer": optimizer.state_dict(), **state}, checkpoint)
    if worker.is_first:
        with torch.no_grad():
            _log(out / f"{name}.jsonl", {"step": recipe.steps, "validation": True, **validate()})
        save({key: master.clone() for key, master in optimizer.masters.items()}, out / f"{name}.pt")
    worker.barrier()
    return load(out / f"{name}.pt")


def mean_metrics(batches: Iterator[Metrics]) -> Metrics:
    """Average of each metric over batches, not counting those where it is undefined."""
    collected: defaultdict[str, list[float]] = defaultdict(list)
    for metrics in batches:
        for key, value in metrics.items():
            collected[key].append(value)
    return _means(collected)


def _means(values: dict[str, list[float]]) -> Metrics:
    return {key: float(np.nanmean(entries)) for key, entries in values.items() if not np.all(np.isnan(entries))}


def _forget_after(path: Path, step: int) -> None:
    """Drop the log lines of steps that will be run again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (entry := json.loads(line))["step"] <= step and "validation" not in entry]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _log(path: Path, entry: dict[str, Any]) -> None:
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()})
    print(path.stem, line, flush=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
