"""How much faster, and where the time goes: one prompt run plain, pruned, ideally and from a smaller picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import tokprune
from tokprune.budget import check_ratio
from tokprune.errors import TokpruneError
from tokprune.profiling import formulas, memory
from tokprune.profiling.report import PLAIN, Cell, ProfileReport
from tokprune.profiling.runs import Profiler, Run, is_out_of_memory, name_of, stages_of, visual_columns
from tokprune.profiling.timing import Measurement, interleave

__all__ = ["Profiler", "Run", "environment", "name_of", "profile", "visual_columns"]

ADVICE = "try a smaller batch, fewer new tokens or a lower ratio"


def _distinct(runs: Sequence[Run]) -> None:
    """Number the runs that would print alike, such as one method with two sets of options."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} #{seen[run.name]}"


def environment(model: Any, device: torch.device, repeats: int, warmup: int) -> dict[str, Any]:
    """What a reader needs to judge the numbers by."""
    import transformers

    config = getattr(model, "config", None)
    return {
        "tokprune": tokprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": str(getattr(config, "_attn_implementation", "?")),
        "repeats": repeats,
        "warmup": warmup,
        "peak": "allocated on the GPU"
        if device.type == "cuda"
        else "live tensors, scratch memory of operators left out",
    }


def profile(
    model: nn.Module,
    inputs: Mapping[str, Any],
    methods: Sequence[Any] = ("divprune",),
    ratios: Sequence[float] = (0.5, 0.1),
    *,
    processor: Any = None,
    new_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 2,
    ideal: bool = True,
    resized: Callable[[float], Mapping[str, Any]] | None = None,
    name: str = "",
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    count_flops: bool = True,
    on_pruned: Callable[[str, Any], None] | None = None,
) -> ProfileReport:
    """Measure one prompt plain and with every method at every ratio; the model is given back unpruned.

    inputs: what `model.generate(**inputs)` takes, on the model's device. methods: names, method objects, or lists of them
    for several stages. processor: for query-aware methods. resized: share of tokens -> inputs made from a smaller picture
    (see `resize.smaller`), the rival of pruning. options: more arguments of `apply` (query, positions, scorer).
    progress: called with each step. on_pruned: given each pruned run's name and what its pruning did, for pictures. A run that gets out
    of memory is reported and left out, the plain one too, and so is a method that cannot work on this model or prompt;
    other errors pass through.
    """
    device = next(model.parameters()).device
    ratios = [check_ratio(r) for r in ratios]
    for method in methods:
        stages_of(method)  # an unknown name is refused before anything runs
    with torch.no_grad():
        tokprune.remove(model)
        profiler = Profiler(model, new_tokens, device, processor)
        full = visual_columns(model, inputs)
        length = int(inputs["input_ids"].shape[1])
        runs = [Run(PLAIN, "plain", inputs, visual=full, prompt=length)]
        runs += [
            Run(f"{name_of(m)} {r:g}", "pruned", inputs, m, name_of(m), r, options=dict(options or {}))
            for r in ratios
            for m in methods
        ]
        _distinct(runs)
        pruned = {run.name for run in runs if run.kind == "pruned"}
        failed: dict[str, str] = {}
        notes: list[str] = []

        def excused(cell: str, error: BaseException) -> bool:
            if isinstance(error, TokpruneError) and cell in pruned:
                failed[cell] = str(error)  # this method cannot work here; the others may
                return True
            if not is_out_of_memory(error):
                return False
            failed[cell] = f"out of memory on {device}; {ADVICE}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return True

        runs += _rivals(profiler, inputs, full, ratios, ideal, resized, notes, excused)
        say = progress or (lambda text: None)
        for run in runs if count_flops else ():
            say(f"counting FLOPs: {run.name}")
            try:
                profiler.look(run, on_pruned)
            except Exception as error:
                if not excused(run.name, error):
                    raise
        cells = {run.name: _timed(profiler, run, say) for run in runs if run.name not in failed}
        times = interleave(cells, repeats, warmup, on_error=excused)
    shape = formulas.DecoderShape.of(model.config)
    return ProfileReport(
        name or type(model).__name__,
        tuple(_cell(model, run, times[run.name], full, shape, new_tokens) for run in runs if run.name in times),
        new_tokens,
        int(inputs["input_ids"].shape[0]),
        environment(model, device, repeats, warmup),
        sum(p.numel() for p in model.parameters()),
        memory.weight_bytes(model),
        memory.weight_bytes(nn.ModuleList([profiler.stages.vision, *profiler.stages.projectors])),
        failed,
        tuple(notes),
        config=_without_paths(json.loads(profiler.model.config.to_json_string(use_diff=False))),
    )


def _without_paths(config: Any) -> Any:
    """A config as plain data without the folder that it was read from."""
    if not isinstance(config, dict):
        return config
    return {key: _without_paths(value) for key, value in config.items() if key != "_name_or_path"}


def _timed(profiler: Profiler, run: Run, say: Callable[[str], None]) -> Callable[[], dict[str, float]]:
    def call() -> dict[str, float]:
        say(f"timing: {run.name}")
        return profiler.once(run)

    return call


def _rivals(
    profiler: Profiler,
    inputs: Mapping[str, Any],
    full: int,
    ratios: Sequence[float],
    ideal: bool,
    resized: Callable[[float], Mapping[str, Any]] | None,
    notes: list[str],
    excused: Callable[[str, BaseException], bool],
) -> list[Run]:
    """The ideal and the resized cell of every ratio, where they can be had; what cannot be is noted."""
    out: list[Run] = []
    for ratio in ratios:
        if ideal:
            # Which tokens they are makes no difference to the time, only how many: the cheapest exact method picks them.
            source = Run("uniform", "pruned", inputs, "uniform", ratio=ratio)
            name = f"ideal {ratio:g}"
            try:
                profiler.once(source)
                run = profiler.ideal(source, name)
                profiler.once(run)
                out.append(run)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                notes.append(f"{name}: this model does not generate from embeddings ({str(error)[:80]})")
            except Exception as error:
                if not excused(name, error):
                    raise
        if resized is not None and ratio < 1:
            smaller = resized(ratio)
            visual = visual_columns(profiler.model, smaller)
            if visual >= full:
                notes.append(f"resized {ratio:g}: this processor makes {visual} tokens of a picture of any size")
                continue
            prompt = int(smaller["input_ids"].shape[1])
            out.append(Run(f"resized {ratio:g}", "resized", smaller, ratio=ratio, visual=visual, prompt=prompt))
    return out


def _cell(
    model: Any, run: Run, times: dict[str, Measurement], full: int, shape: formulas.DecoderShape, new_tokens: int
) -> Cell:
    fed = new_tokens - 1  # the last token is never fed back
    dtype = next(model.parameters()).dtype
    expected = memory.kv_cache_bytes_of(model.config, run.prompt + fed, run.batch, dtype) if run.before_llm else None
    per_layer = not run.before_llm and len(run.cached) == shape.layers
    tokens = [n - fed for n in run.cached] if per_layer else run.prompt
    return Cell(
        run.name,
        run.kind,
        times,
        run.visual,
        full,
        run.prompt,
        run.label,
        run.ratio,
        run.counted.to_dict() if run.counted else {},
        {name: formulas.formula_total(layer, tokens, shape) for name, layer in formulas.FORMULAS.items()},
        run.cache_bytes,
        expected,
        run.peak,
        tokens={"projector": run.projected, "llm": run.visual, "prompt": run.prompt, "cached": run.cached},
    )
