"""How much faster, and where the time goes: one prompt run plain, pruned, ideally and from a smaller picture."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import tokprune
from tokprune.budget import check_ratio
from tokprune.errors import TokpruneError, UnsupportedModelError, raised_here
from tokprune.profiling import formulas, memory
from tokprune.profiling.report import PLAIN, ProfileReport, RunResult
from tokprune.profiling.runs import Profiler, ProfileRun, is_out_of_memory, name_of, stages_of, visual_columns
from tokprune.profiling.timing import Measurement, interleave
from tokprune.runtime.prefill import LastRun
from tokprune.types import VLM, Fields, Inputs, JsonObject, MethodLike, Options, Processor

__all__ = ["ProfileRun", "Profiler", "environment", "name_of", "profile", "visual_columns"]

REFUSALS = (TypeError, ValueError, KeyError, AttributeError)  # what models raise that need more than embeddings
ADVICE = "try a smaller batch, fewer new tokens or a lower ratio"


def environment(model: VLM, device: torch.device, repeats: int, warmup: int) -> JsonObject:
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
    model: VLM,
    inputs: Inputs,
    methods: Sequence[MethodLike] = ("divprune",),
    ratios: Sequence[float] = (0.5, 0.1),
    *,  # the options of the public entry point
    processor: Processor | None = None,
    new_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 2,
    ideal: bool = True,
    resized: Callable[[float], Fields] | None = None,
    name: str = "",
    options: Options | None = None,
    progress: Callable[[str], None] | None = None,
    count_flops: bool = True,
    on_pruned: Callable[[str, LastRun | None], None] | None = None,
) -> ProfileReport:
    """Measure one prompt plain and with every method at every ratio; the model is given back unpruned.

    inputs: what `model.generate(**inputs)` takes, on the model's device. methods: names, method objects, or lists of
    them for several stages. processor: for query-aware methods. resized: keep ratio -> inputs made from a smaller
    picture (see `resize.shrinking`), the rival of pruning. options: more arguments of `apply` (query, positions,
    scorer). progress: called with each step. on_pruned: given each pruned run's name and what its pruning did, for
    pictures. A run that gets out of memory is reported and left out, the plain one too, and so is a method that cannot
    work on this model or prompt; other errors pass through.
    """
    ratios = [check_ratio(r) for r in ratios]
    for method in methods:
        stages_of(method)  # an unknown name is refused before anything runs
    device = next(model.parameters()).device
    with torch.no_grad():
        tokprune.remove(model)
        bench = _Bench(Profiler(model, new_tokens, device, processor), inputs, progress or (lambda text: None))
        bench.add_pruned(methods, ratios, options or {})
        for ratio in ratios:
            if ideal:
                bench.add_ideal(ratio)
            if resized is not None and ratio < 1:
                bench.add_resized(ratio, resized(ratio))
        if count_flops:
            bench.count(on_pruned)
        times = bench.time(repeats, warmup)
    stages = bench.profiler.stages
    return ProfileReport(
        model=name or type(model).__name__,
        cells=tuple(_row(bench.profiler, run, times[run.name], bench.full) for run in bench.runs if run.name in times),
        new_tokens=new_tokens,
        batch=int(inputs["input_ids"].shape[0]),
        environment=environment(model, device, repeats, warmup),
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=memory.weight_bytes(model),
        vision_bytes=memory.weight_bytes(nn.ModuleList([stages.vision, *stages.projectors])),
        failed=bench.failed,
        notes=tuple(bench.notes),
        config=_without_paths(json.loads(bench.profiler.model.config.to_json_string(use_diff=False))),
    )


class _Bench:
    """The runs of one prompt that are compared, and what could not be run. full: its visual tokens, unpruned."""

    def __init__(self, profiler: Profiler, inputs: Inputs, progress: Callable[[str], None]) -> None:
        self.profiler, self.inputs, self.progress = profiler, inputs, progress
        self.full = visual_columns(profiler.model, inputs)
        length = int(inputs["input_ids"].shape[1])
        self.runs = [ProfileRun(PLAIN, "plain", inputs, visual=self.full, prompt=length)]
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []

    def add_pruned(self, methods: Sequence[MethodLike], ratios: Sequence[float], options: Options) -> None:
        """Every method at every ratio; what would print alike, as one method with two sets of options, is numbered."""
        seen: dict[str, int] = {}
        for ratio in ratios:
            for method in methods:
                name = f"{name_of(method)} {ratio:g}"
                seen[name] = seen.get(name, 0) + 1
                name = name if seen[name] == 1 else f"{name} #{seen[name]}"
                run = ProfileRun(name, "pruned", self.inputs, method, name_of(method), ratio, options=dict(options))
                self.runs.append(run)

    def add_ideal(self, ratio: float) -> None:
        """The LLM fed the reduced embeddings by hand, where the model takes embeddings; else a note says why not."""
        # Which tokens they are makes no difference to the time, only how many: the cheapest exact method picks them.
        source, name = ProfileRun("uniform", "pruned", self.inputs, "uniform", ratio=ratio), f"ideal {ratio:g}"
        run = None
        try:
            self.profiler.once(source)
            run = self.profiler.ideal(source, name)
            self.profiler.once(run)
        except UnsupportedModelError as error:
            self.notes.append(f"{name}: not measured, {error}")
        except Exception as error:
            # Families differ in what they need beside embeddings; the pruned runs do not depend on it.
            if run is not None and isinstance(error, REFUSALS) and not raised_here(error):
                self.notes.append(
                    f"{name}: not measured, generate() refuses bare embeddings: {type(error).__name__}: {error}"
                )
            elif not self.excuse(name, error):
                raise
        else:
            self.runs.append(run)

    def add_resized(self, ratio: float, inputs: Inputs) -> None:
        """The prompt with a smaller picture, unless its processor makes as many tokens of that."""
        visual, prompt = visual_columns(self.profiler.model, inputs), int(inputs["input_ids"].shape[1])
        if visual >= self.full:
            self.notes.append(f"resized {ratio:g}: this processor makes {visual} tokens of a picture of any size")
            return
        run = ProfileRun(f"resized {ratio:g}", "resized", inputs, ratio=ratio, visual=visual, prompt=prompt)
        self.runs.append(run)

    def excuse(self, name: str, error: BaseException) -> bool:
        """Note why a run gives no numbers, where the others may; False for errors that must not be hidden."""
        if isinstance(error, TokpruneError) and any(r.name == name and r.kind == "pruned" for r in self.runs):
            self.failed[name] = str(error)
            return True
        if not is_out_of_memory(error):
            return False
        device = self.profiler.device
        self.failed[name] = f"out of memory on {device}; {ADVICE}"
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def count(self, on_pruned: Callable[[str, LastRun | None], None] | None) -> None:
        """FLOPs, tokens and bytes of every run, in runs of their own."""
        for run in self.runs:
            self.progress(f"counting FLOPs: {run.name}")
            try:
                self.profiler.look(run, on_pruned)
            except Exception as error:
                if not self.excuse(run.name, error):
                    raise

    def time(self, repeats: int, warmup: int) -> dict[str, dict[str, Measurement]]:
        """The times of every run that has not failed, interleaved."""
        calls = {run.name: functools.partial(self._timed, run) for run in self.runs if run.name not in self.failed}
        return interleave(calls, repeats, warmup, on_error=self.excuse)

    def _timed(self, run: ProfileRun) -> dict[str, float]:
        self.progress(f"timing: {run.name}")
        return self.profiler.once(run)


def _without_paths(config: object) -> Any:
    """A config as plain data without the folder that it was read from."""
    if not isinstance(config, dict):
        return config
    return {key: _without_paths(value) for key, value in config.items() if key != "_name_or_path"}


def _row(profiler: Profiler, run: ProfileRun, times: dict[str, Measurement], full: int) -> RunResult:
    """What one run gave, as a row of the report. full: visual tokens of the unpruned prompt."""
    model = profiler.model
    shape, dtype = formulas.DecoderShape.of(model.config), next(model.parameters()).dtype
    fed = profiler.new_tokens - 1  # the last token is never fed back
    expected = memory.kv_cache_bytes_of(model.config, run.prompt + fed, run.batch, dtype) if run.before_llm else None
    per_layer = not run.before_llm and len(run.cached) == shape.layers
    tokens = [n - fed for n in run.cached] if per_layer else run.prompt
    return RunResult(
        name=run.name,
        kind=run.kind,
        times=times,
        visual=run.visual,
        visual_full=full,
        prompt=run.prompt,
        method=run.label,
        ratio=run.ratio,
        flops=run.counted.to_dict() if run.counted else {},
        formulas={name: formulas.formula_total(layer, tokens, shape) for name, layer in formulas.FORMULAS.items()},
        cache_bytes=run.cache_bytes,
        cache_expected=expected,
        peak_bytes=run.peak,
        tokens={"projector": run.projected, "llm": run.visual, "prompt": run.prompt, "cached": run.cached},
    )
