"""How much faster, and where the time goes: one prompt run plain, pruned, ideally and from a smaller picture."""

from __future__ import annotations

import functools
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tokprune
from tokprune.budget import check_ratio
from tokprune.errors import OptionError
from tokprune.profiling import flops, formulas, memory
from tokprune.profiling.report import PLAIN, Cell, ProfileReport
from tokprune.profiling.stages import StageModules, find_stages
from tokprune.profiling.timing import Measurement, StageClock, interleave

ENCODERS = ("get_image_features", "get_video_features")


@dataclass
class _Run:
    """A cell to be measured: how to set it up, and what a run left behind."""

    name: str
    kind: str
    inputs: Mapping[str, Any]
    method: Any = None
    label: str | None = None
    ratio: float | None = None
    visual: int = 0
    prompt: int = 0
    cache_bytes: int | None = None
    peak: int | None = None
    counted: flops.StageFlops | None = None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # encoder calls of the ideal cell
    options: dict[str, Any] = field(default_factory=dict)


class Profiler:
    """Measures cells of one model and one prompt; `profile` is the usual way in."""

    def __init__(self, model: nn.Module, new_tokens: int, device: torch.device, processor: Any = None) -> None:
        if new_tokens < 2:
            raise OptionError(f"new_tokens={new_tokens}; at least 2, since the second token is the first decode step.")
        self.model: Any = model
        self.stages: StageModules = find_stages(model)
        self.base: Any = self.stages.base
        self.new_tokens, self.device, self.processor = new_tokens, device, processor

    def _pruned(self, run: _Run) -> Any:
        if run.kind != "pruned":
            return nullcontext()
        return tokprune.apply(self.model, run.method, ratio=run.ratio, processor=self.processor, **run.options)

    def _generate(self, run: _Run) -> Any:
        for name, arguments in run.calls:  # the ideal cell encodes the picture like everyone else
            getattr(self.base, name)(**arguments)
        return self.model.generate(
            **run.inputs,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def once(self, run: _Run) -> dict[str, float]:
        """One timed call."""
        clock = StageClock(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._pruned(run) as pruning, torch.no_grad():
            with clock.watch(self.stages):
                out = self._generate(run)
            if pruning is not None:
                run.visual, run.prompt = _kept(pruning), int(pruning.last.length)
        if self.device.type == "cuda":
            run.peak = int(torch.cuda.max_memory_allocated(self.device))
        run.cache_bytes = memory.kv_cache_bytes(getattr(out, "past_key_values", None))
        times = clock.times()
        times["decode_tokens_per_s"] *= _batch(run)  # a step gives every prompt a token
        return times

    def count(self, run: _Run) -> None:
        """FLOPs of a cell, counted in a run of their own."""
        with self._pruned(run), torch.no_grad():
            if run.kind != "ideal":
                run.counted = flops.stage_flops(self.model, run.inputs, self.stages)
                return
            vision, projector = flops.vision_flops(
                lambda: [getattr(self.base, name)(**arguments) for name, arguments in run.calls], self.stages
            )
            llm = flops.stage_flops(self.model, run.inputs, self.stages)
            run.counted = flops.StageFlops(vision, projector, 0, llm.prefill, llm.decode, llm.operators)

    def ideal(self, source: _Run, name: str) -> _Run:
        """The cell that feeds the LLM the embeddings which `source` left over, by hand."""
        caught: dict[str, Any] = {}

        def catch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if "embeds" not in caught and isinstance(kwargs.get("inputs_embeds"), Tensor):
                caught["embeds"] = kwargs["inputs_embeds"].detach().clone()

        with _recorded(self.base) as calls, self._pruned(source), torch.no_grad():
            handle = self.stages.language.register_forward_pre_hook(catch, with_kwargs=True)
            try:
                self._generate(source)
            finally:
                handle.remove()
        embeds = caught["embeds"]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        run = _Run(name, "ideal", {"inputs_embeds": embeds, "attention_mask": mask}, ratio=source.ratio)
        run.visual, run.prompt, run.calls = source.visual, embeds.shape[1], list(calls)
        return run


@contextmanager
def _recorded(base: Any) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Notes the arguments of the outermost calls of the model's picture and video encoders."""
    calls: list[tuple[str, dict[str, Any]]] = []
    patched, depth = [], [0]

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                names = list(_parameters(original))
                calls.append((name, {**dict(zip(names, args, strict=False)), **kwargs}))
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    try:
        for name in ENCODERS:
            if hasattr(base, name):
                setattr(base, name, wrap(name, getattr(base, name)))
                patched.append(name)
        yield calls
    finally:
        for name in patched:
            base.__dict__.pop(name, None)


def _parameters(function: Callable[..., Any]) -> Iterator[str]:
    return (name for name in inspect.signature(function).parameters if name not in ("self", "kwargs"))


def _batch(run: _Run) -> int:
    return int(next(v for v in run.inputs.values() if isinstance(v, Tensor)).shape[0])


def _distinct(runs: Sequence[_Run]) -> None:
    """Number the runs that would print alike, such as one method with two sets of options."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} #{seen[run.name]}"


def _kept(pruning: Any) -> int:
    """Visual columns of the longest prompt that stay, separators included."""
    per_row: dict[int, int] = {}
    for stream in pruning.last.streams:
        per_row[stream.row] = per_row.get(stream.row, 0) + stream.kept + stream.separators_kept
    return max(per_row.values(), default=0)


def visual_columns(model: Any, inputs: Mapping[str, Any]) -> int:
    """Placeholder columns of the longest prompt."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return 0
    config = getattr(model, "config", None)
    tokens = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        if token is not None:
            visual |= ids == token
    return int(visual.sum(1).max())


def name_of(method: Any) -> str:
    """The name to print for a method given by name, as an object or as several of different stages."""
    if isinstance(method, str):
        return method
    if isinstance(method, Sequence):
        return "+".join(name_of(m) for m in method)
    return str(method.info.name)


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
) -> ProfileReport:
    """Measure one prompt plain and with every method at every ratio; the model is given back unpruned.

    inputs: what `model.generate(**inputs)` takes, on the model's device. methods: names, method objects, or lists of them
    for several stages. processor: for query-aware methods. resized: share of tokens -> inputs made from a smaller picture
    (see `resize.smaller`), the rival of pruning. options: more arguments of `apply` (query, positions, scorer).
    progress: told each step. A cell that runs out of memory is reported and left out; other errors pass through.
    """
    device = next(model.parameters()).device
    ratios = [check_ratio(r) for r in ratios]
    with torch.no_grad():
        tokprune.remove(model)
        profiler = Profiler(model, new_tokens, device, processor)
        full = visual_columns(model, inputs)
        length = int(inputs["input_ids"].shape[1])
        runs = [_Run(PLAIN, "plain", inputs, visual=full, prompt=length)]
        runs += [
            _Run(f"{name_of(m)} {r:g}", "pruned", inputs, m, name_of(m), r, options=dict(options or {}))
            for r in ratios
            for m in methods
        ]
        _distinct(runs)
        failed: dict[str, str] = {}
        notes: list[str] = []

        def out_of_memory(cell: str, error: BaseException) -> bool:
            if not isinstance(error, torch.OutOfMemoryError):
                return False
            failed[cell] = f"out of memory on {device}; try a smaller batch, fewer new tokens or a lower ratio"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return True

        runs += _rivals(profiler, runs, ratios, ideal, resized, notes, out_of_memory)
        alive = [run for run in runs if run.name not in failed]
        say = progress or (lambda text: None)
        if count_flops:
            for run in alive:
                say(f"counting FLOPs: {run.name}")
                try:
                    profiler.count(run)
                except torch.OutOfMemoryError as error:
                    out_of_memory(run.name, error)
        cells = {run.name: _timed(profiler, run, say) for run in runs if run.name not in failed}
        times = interleave(cells, repeats, warmup, on_error=out_of_memory)
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
    )


def _timed(profiler: Profiler, run: _Run, say: Callable[[str], None]) -> Callable[[], dict[str, float]]:
    def call() -> dict[str, float]:
        say(f"timing: {run.name}")
        return profiler.once(run)

    return call


def _rivals(
    profiler: Profiler,
    runs: Sequence[_Run],
    ratios: Sequence[float],
    ideal: bool,
    resized: Callable[[float], Mapping[str, Any]] | None,
    notes: list[str],
    out_of_memory: Callable[[str, BaseException], bool],
) -> list[_Run]:
    """The ideal and the resized cell of every ratio, where they can be had; what cannot be is noted."""
    out: list[_Run] = []
    for ratio in ratios:
        source = next((r for r in runs if r.ratio == ratio), None)
        if source is None:
            continue
        if ideal:
            try:
                profiler.once(source)
                run = profiler.ideal(source, f"ideal {ratio:g}")
                profiler.once(run)
                out.append(run)
            except torch.OutOfMemoryError as error:
                out_of_memory(source.name, error)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                notes.append(f"ideal {ratio:g}: this model does not generate from embeddings ({str(error)[:80]})")
        if resized is not None and ratio < 1:
            smaller = resized(ratio)
            visual = visual_columns(profiler.model, smaller)
            if visual >= runs[0].visual:
                notes.append(f"resized {ratio:g}: this processor makes {visual} tokens of a picture of any size")
                continue
            prompt = int(smaller["input_ids"].shape[1])
            out.append(_Run(f"resized {ratio:g}", "resized", smaller, ratio=ratio, visual=visual, prompt=prompt))
    return out


def _cell(
    model: Any, run: _Run, times: dict[str, Measurement], full: int, shape: formulas.DecoderShape, new_tokens: int
) -> Cell:
    cached = run.prompt + new_tokens - 1  # the last token is never fed back
    batch = _batch(run)
    dtype = next(model.parameters()).dtype
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
        {name: formulas.formula_total(layer, run.prompt, shape) for name, layer in formulas.FORMULAS.items()},
        run.cache_bytes,
        memory.kv_cache_bytes_of(model.config, cached, batch, dtype),
        run.peak,
    )
