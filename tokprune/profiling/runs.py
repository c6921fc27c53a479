"""The ways of running one prompt that a profile compares, and what sets one up, runs it once and looks inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

import tokprune
from tokprune.adapters.dialect import cache_of
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.profiling import flops, memory
from tokprune.profiling.stages import StageModules, find_stages
from tokprune.profiling.timing import StageClock
from tokprune.registry import method_class
from tokprune.runtime.handle import Pruning
from tokprune.runtime.prefill import LastRun
from tokprune.types import VLM, Inputs, JsonObject, MethodLike, Processor

ENCODERS = ("get_image_features", "get_video_features")


@dataclass
class ProfileRun:
    """A cell to be measured: how to set it up, and what a run left behind."""

    name: str
    kind: str
    inputs: Inputs
    method: MethodLike | None = None
    label: str | None = None
    ratio: float | None = None
    visual: int = 0
    prompt: int = 0
    cache_bytes: int | None = None
    cached: list[int] = field(default_factory=list)  # tokens in each layer's cache
    peak: int | None = None
    projected: int | None = None  # tokens into the projector, per prompt
    counted: flops.StageFlops | None = None
    calls: list[tuple[str, JsonObject]] = field(default_factory=list)  # encoder calls of the ideal cell
    options: JsonObject = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Prompts at once."""
        return int(next(v for v in self.inputs.values() if isinstance(v, Tensor)).shape[0])

    @property
    def before_llm(self) -> bool:
        """Whether all that this run prunes is gone before the LLM: each layer sees and caches as many tokens."""
        return self.method is None or not {"decoder", "cache"} & stages_of(self.method)


class Profiler:
    """Measures runs of one model and one prompt; `profile` is the usual way in."""

    def __init__(
        self, model: nn.Module, new_tokens: int, device: torch.device, processor: Processor | None = None
    ) -> None:
        if new_tokens < 2:
            raise OptionError(f"new_tokens={new_tokens}; at least 2, since the second token is the first decode step.")
        self.model = cast("VLM", model)
        self.stages: StageModules = find_stages(model)
        self.base = self.stages.base
        self.new_tokens, self.device, self.processor = new_tokens, device, processor

    def _pruned(self, run: ProfileRun) -> AbstractContextManager[Pruning | None]:
        if run.method is None:
            return nullcontext()
        return tokprune.apply(self.model, run.method, ratio=run.ratio, processor=self.processor, **run.options)

    def _generate(self, run: ProfileRun) -> Any:
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

    def once(self, run: ProfileRun) -> dict[str, float]:
        """One timed call."""
        clock = StageClock(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._pruned(run) as pruning, torch.no_grad():
            with clock.watch(self.stages):
                out = self._generate(run)
            if pruning is not None:
                run.visual, run.prompt = _kept(pruning.last), int(pruning.last.length)
        if self.device.type == "cuda":
            run.peak = int(torch.cuda.max_memory_allocated(self.device))
        cache = cache_of(out)
        run.cache_bytes, run.cached = memory.kv_cache_bytes(cache), memory.cached_tokens(cache)
        times = clock.times()
        times["decode_tokens_per_s"] *= run.batch  # a step gives every prompt a token
        return times

    def look(self, run: ProfileRun, on_pruned: Callable[[str, LastRun | None], None] | None = None) -> None:
        """Count a run's FLOPs and tokens, and its live bytes where the device keeps no count, in runs of their own.

        on_pruned: given the run's name and what the pruning did (`Pruning.last`).
        """
        rows: list[int] = []

        def see(module: nn.Module, args: tuple[object, ...], kwargs: JsonObject) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if tensors and not rows:
                rows.append(tensors[0].shape[:-1].numel())

        with self._pruned(run) as pruning, torch.no_grad():
            first = self.stages.projectors[:1]
            handles = [p.register_forward_pre_hook(see, with_kwargs=True) for p in first]
            try:
                run.counted = self._flops(run)
            finally:
                for handle in handles:
                    handle.remove()
            if pruning is not None and on_pruned is not None:
                on_pruned(run.name, pruning.last)
            if self.device.type == "cpu":
                existing = [*self.model.parameters(), *self.model.buffers()]
                existing += [v for v in run.inputs.values() if isinstance(v, Tensor)]
                _, run.peak = memory.live_peak(lambda: self._generate(run), existing)
        run.projected = rows[0] // run.batch if rows else None

    def _flops(self, run: ProfileRun) -> flops.StageFlops:
        if run.kind != "ideal":
            return flops.stage_flops(self.model, run.inputs, self.stages)
        vision, projector = flops.vision_flops(
            lambda: [getattr(self.base, name)(**arguments) for name, arguments in run.calls], self.stages
        )
        llm = flops.stage_flops(self.model, run.inputs, self.stages)
        return flops.StageFlops(vision, projector, 0, llm.prefill, llm.decode, llm.operators)

    def ideal(self, source: ProfileRun, name: str) -> ProfileRun:
        """The run that feeds the LLM the embeddings which `source` left over, by hand."""
        caught: JsonObject = {}

        def catch(module: nn.Module, args: tuple[object, ...], kwargs: JsonObject) -> None:
            if "embeds" not in caught and isinstance(kwargs.get("inputs_embeds"), Tensor):
                caught["embeds"] = kwargs["inputs_embeds"].detach().clone()
                mask = kwargs.get("attention_mask")
                caught["mask"] = mask.clone() if isinstance(mask, Tensor) and mask.ndim == 2 else None

        with _recorded(self.base) as calls, self._pruned(source), torch.no_grad():
            handle = self.stages.language.register_forward_pre_hook(catch, with_kwargs=True)
            try:
                self._generate(source)
            finally:
                handle.remove()
        if "embeds" not in caught:
            raise UnsupportedModelError(f"the LLM of {type(self.model).__name__} is not called with inputs_embeds.")
        embeds = caught["embeds"]
        mask = caught["mask"]  # padding of a batch stays padding
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        run = ProfileRun(name, "ideal", {"inputs_embeds": embeds, "attention_mask": mask}, ratio=source.ratio)
        run.visual, run.prompt, run.calls = source.visual, embeds.shape[1], list(calls)
        return run


@contextmanager
def _recorded(base: nn.Module) -> Iterator[list[tuple[str, JsonObject]]]:
    """Notes the arguments of the outermost calls of the model's picture and video encoders."""
    calls: list[tuple[str, JsonObject]] = []
    patched, depth = [], [0]

    def wrap(name: str, original: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(original)
        def call(*args: object, **kwargs: object) -> object:
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


def _parameters(function: Callable[..., object]) -> Iterator[str]:
    return (name for name in inspect.signature(function).parameters if name not in ("self", "kwargs"))


def _kept(last: LastRun) -> int:
    """Visual columns of the longest prompt that stay, separators included."""
    per_row: dict[int, int] = {}
    for stream in last.streams:
        per_row[stream.row] = per_row.get(stream.row, 0) + stream.kept + stream.separators_kept
    return max(per_row.values(), default=0)


def placeholders(model: VLM, ids: Tensor) -> Tensor:
    """Which prompt columns stand for pictures or clips. ids: (B, L) -> (B, L) bool."""
    config = getattr(model, "config", None)
    tokens = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    return torch.isin(ids, ids.new_tensor([t for t in tokens if t is not None]))


def visual_columns(model: VLM, inputs: Inputs) -> int:
    """Placeholder columns of the longest prompt."""
    ids = inputs.get("input_ids")
    return int(placeholders(model, ids).sum(1).max()) if isinstance(ids, Tensor) else 0


def name_of(method: MethodLike) -> str:
    """The name to print for a method given by name, as an object or as several of different stages."""
    if isinstance(method, str):
        return method
    if isinstance(method, Sequence):
        return "+".join(name_of(m) for m in method)
    return str(method.label)


def stages_of(method: MethodLike) -> set[str]:
    """The stages that a method given in any of these ways works in."""
    if isinstance(method, str):
        return {method_class(method).stage}
    if isinstance(method, Sequence):
        return set().union(*(stages_of(m) for m in method))
    return {str(method.stage)}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
