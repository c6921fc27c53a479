"""Which ratio, at which stage, reaches a target on a device, and where pruning stops paying: roofline arithmetic.

Time of a part = max(FLOPs / attainable FLOP/s, bytes moved / attainable bandwidth). Batch-1 decoding is bound by
reading the weights, prefill by FLOPs; so pruning shortens the prefill and the cache, not the tower and hardly the
decoding. That a larger LLM with fewer visual tokens can be the better use of the same time is the finding of Li et al.
(ICLR 2025, "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters") for visual reasoning; reading text
needs its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from tokprune.budget import kept
from tokprune.errors import OptionError, unknown
from tokprune.profiling import formulas
from tokprune.profiling.build import build_meta, config_of, vision_calls
from tokprune.profiling.devices import Device
from tokprune.profiling.memory import kv_cache_bytes_of, readable
from tokprune.profiling.presets import Preset, preset
from tokprune.profiling.resolution import Size
from tokprune.profiling.stages import find_stages
from tokprune.types import JsonObject

Target = Literal["ttft", "total", "memory"]


@dataclass(frozen=True)
class Workload:
    """One request: picture size (or clip of frames), text tokens around it, tokens to generate, requests at once."""

    size: Size
    frames: int | None = None
    text: int = 64
    new_tokens: int = 64
    batch: int = 1


@dataclass(frozen=True)
class Estimate:
    """Seconds by part and bytes on the device for one number of visual tokens."""

    visual: int
    vision: float
    prefill: float
    decode: float
    memory: float
    flops: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.vision + self.prefill

    @property
    def total(self) -> float:
        """Seconds to the last token."""
        return self.ttft + self.decode

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(("vision", "prefill", "decode"), key=lambda part: getattr(self, part))


def _vision(known: Preset, size: Size, frames: int | None) -> tuple[float, float]:
    """FLOPs of tower and projector for one request, and their parameters."""
    model = build_meta(known)
    return float(sum(vision_calls(model, known, size, frames))), float(find_stages(model).vision_parameters)


class CostModel:
    """Costs of one preset on one device for one workload, as functions of the visual tokens that the LLM receives.

    vision: FLOPs and parameters of tower and projector, counted on the meta device when not given.
    """

    def __init__(
        self,
        known: Preset,
        place: Device,
        work: Workload,
        dtype: torch.dtype = torch.bfloat16,
        vision: tuple[float, float] | None = None,
    ) -> None:
        self.preset, self.device, self.work, self.dtype = known, place, work, dtype
        self.shape, self.config = known.decoder, config_of(known)
        self.visual = known.count(work.size, work.frames)
        self.vision_flops, vision_parameters = vision or _vision(known, work.size, work.frames)
        self.vision_bytes = vision_parameters * dtype.itemsize
        self.llm_bytes = known.parameters * dtype.itemsize - self.vision_bytes

    def at(self, visual: int, full_layers: int = 0) -> Estimate:
        """The estimate with `visual` tokens; the first `full_layers` layers see them all (decoder-stage pruning)."""
        work, place = self.work, self.device
        everything = work.text + self.visual.placeholders
        tokens = work.text + visual
        layers = [everything if i < full_layers else tokens for i in range(self.shape.layers)]
        prefill = work.batch * formulas.exact_prefill(self.shape, layers)
        decode = work.batch * formulas.exact_decode(self.shape, layers)
        cache = sum(
            kv_cache_bytes_of(self.config, n, work.batch, self.dtype) * count / self.shape.layers
            for n, count in ((everything, full_layers), (tokens, self.shape.layers - full_layers))
        )
        grown = kv_cache_bytes_of(self.config, work.new_tokens, work.batch, self.dtype)
        steps = max(work.new_tokens - 1, 0)
        # Widest activations of the prefill: MLP input and output of one layer, and the hidden states beside it.
        widest = work.batch * max(layers) * (2 * self.shape.ffn + 4 * self.shape.width) * self.dtype.itemsize
        return Estimate(
            visual,
            place.seconds(work.batch * self.vision_flops, self.vision_bytes),
            place.seconds(prefill, self.llm_bytes + cache),
            steps * place.seconds(decode, self.llm_bytes + cache + grown / 2),
            self.vision_bytes + self.llm_bytes + cache + grown + widest,
            int(work.batch * self.vision_flops) + prefill + steps * decode,
        )

    def most(self, target: Target, limit: float, full_layers: int = 0) -> int | None:
        """The largest number of visual tokens that meets the limit (seconds or bytes), None when not even one does."""

        def fits(n: int) -> bool:
            return getattr(self.at(n, full_layers), target) <= limit

        low, high = 1, self.visual.placeholders
        if not fits(low):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def stops_paying(self, gain: float = 0.05) -> Estimate:
        """The estimate from which on halving the tokens again shortens the whole by less than `gain`."""
        here = self.at(self.visual.placeholders)
        while here.visual > 1:
            half = self.at(max(1, here.visual // 2))
            if half.total > (1 - gain) * here.total:
                return here
            here = half
        return here


OPERATIONS = 40
"""Operations of one layer of a LLaMA-like LLM as transformers writes it, attention as one kernel, views left out."""
LAUNCH = 5e-6
"""Seconds that a host takes to launch one from Python, in order of magnitude; ours."""

#: Presets of one recipe in growing size.
LADDERS: tuple[tuple[str, ...], ...] = (
    ("llava-1.5-7b", "llava-1.5-13b"),
    ("llava-onevision-0.5b", "llava-onevision-7b"),
    ("qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-vl-72b"),
    ("qwen3-vl-4b", "qwen3-vl-8b"),
    ("internvl3-1b", "internvl3-8b", "internvl3-78b"),
    ("smolvlm-256m", "smolvlm-500m", "smolvlm-2.2b"),
    ("fastvlm-0.5b", "fastvlm-1.5b", "fastvlm-7b"),
)


def larger(known: Preset) -> list[Preset]:
    """The larger presets of the same recipe."""
    for ladder in LADDERS:
        if known.name in ladder:
            return [preset(name) for name in ladder[ladder.index(known.name) + 1 :]]
    return []


@dataclass(frozen=True)
class Alternative:
    """A larger model and how many `visual` tokens (of visual_full) cost no more in it than all in the small one."""

    preset: str
    visual: int | None
    visual_full: int
    estimate: Estimate | None


@dataclass(frozen=True)
class RatioPlan:
    """The answer: estimates at several ratios, the most tokens per stage that meet the target, and advice in words."""

    preset: str
    device: str
    work: Workload
    full: Estimate
    rows: tuple[tuple[float, Estimate], ...]
    target: Target | None
    limit: float | None
    connector: int | None
    decoder: int | None
    decoder_layer: int
    stops: Estimate
    alternatives: tuple[Alternative, ...]
    advice: tuple[str, ...] = field(default=())

    def to_dict(self) -> JsonObject:
        """Plain data with type and version; times in seconds, memory in bytes."""

        def estimate(e: Estimate | None) -> JsonObject | None:
            return None if e is None else vars(e) | {"ttft": e.ttft, "total": e.total, "bound": e.bound}

        return {
            "type": "tokprune.Plan",
            "version": 1,
            "preset": self.preset,
            "device": self.device,
            "workload": vars(self.work),
            "full": estimate(self.full),
            "rows": [{"ratio": ratio, **(estimate(e) or {})} for ratio, e in self.rows],
            "target": self.target,
            "limit": self.limit,
            "connector_tokens": self.connector,
            "decoder_tokens": self.decoder,
            "decoder_layer": self.decoder_layer,
            "stops_paying": estimate(self.stops),
            "alternatives": [vars(a) | {"estimate": estimate(a.estimate)} for a in self.alternatives],
            "advice": list(self.advice),
        }


def plan(
    known: Preset,
    place: Device,
    work: Workload | None = None,
    target: Target | None = None,
    limit: float | None = None,
    *,  # options by name: this is a public entry point
    ratios: Sequence[float] = (1.0, 0.5, 0.25, 0.1, 0.05),
    decoder_layer: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    compare: bool = True,
    vision: Mapping[str, tuple[float, float]] | None = None,
) -> RatioPlan:
    """What pruning can do for a preset on a device.

    target, limit: "ttft" or "total" in seconds, or "memory" in bytes. decoder_layer: layers that stay complete in the
    decoder-stage alternative (FastV's K). compare: look at larger models at equal cost. vision: FLOPs and parameters of
    tower and projector by preset name, where they are known already.
    """
    towers = vision or {}
    if (target is None) != (limit is None):
        raise OptionError(
            f"target={target!r}, limit={limit!r}; give both, such as target='ttft', limit=0.2, or neither."
        )
    if target is not None and target not in ("ttft", "total", "memory"):
        raise unknown("target", target, ("ttft", "total", "memory"))
    work = work or Workload(known.default_size)
    costs = CostModel(known, place, work, dtype, towers.get(known.name))
    n = costs.visual.placeholders
    full = costs.at(n)
    connector = decoder = None
    if target is not None and limit is not None:
        connector, decoder = costs.most(target, limit), costs.most(target, limit, decoder_layer)
    stops = costs.stops_paying()
    others = [_alternative(bigger, costs, full, towers.get(bigger.name)) for bigger in larger(known)] if compare else []
    made = RatioPlan(
        preset=known.name,
        device=place.name,
        work=work,
        full=full,
        rows=tuple((r, costs.at(kept(n, r))) for r in ratios),
        target=target,
        limit=limit,
        connector=connector,
        decoder=decoder,
        decoder_layer=decoder_layer,
        stops=stops,
        alternatives=tuple(others),
    )
    return replace(made, advice=tuple(_advice(made, costs)))


def _alternative(bigger: Preset, small: CostModel, full: Estimate, vision: tuple[float, float] | None) -> Alternative:
    costs = CostModel(bigger, small.device, small.work, small.dtype, vision)
    tokens = costs.most("total", full.total)
    fits = tokens is not None and costs.at(tokens).memory <= small.device.memory
    return Alternative(
        bigger.name,
        tokens if fits else None,
        costs.visual.placeholders,
        costs.at(tokens) if fits and tokens is not None else None,
    )


def _launches(made: RatioPlan, costs: CostModel) -> list[str]:
    """A warning where the operations of a pruned prefill take longer to launch than to compute."""
    floor = costs.shape.layers * OPERATIONS * LAUNCH + costs.device.overhead
    short = [ratio for ratio, estimate in made.rows if estimate.prefill < floor]
    if not short:
        return []
    return [
        f"launch-bound at ratio {max(short):g} and below: the host needs about {_time(floor)} to launch the operations "
        f"of a prefill one by one ({OPERATIONS} a layer, {LAUNCH * 1e6:g} µs each, a rough figure), so that fewer "
        "tokens gain nothing more; batch prompts, or compile the model"
    ]


def _amount(target: Target, value: float) -> str:
    return readable(value) if target == "memory" else _time(value)


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _gain(made: RatioPlan, costs: CostModel) -> str:
    """How far pruning pays, and what bounds it."""
    full, n = made.full, costs.visual.placeholders
    gain = full.total / made.stops.total
    name = {"vision": "tower-bound", "decode": "decode-bound"}.get(full.bound, "bound by weights and launches")
    if made.stops.visual >= n:
        return f"pruning hardly pays here ({name}): the time goes into {full.bound}, which it does not shorten"
    if full.bound == "prefill":
        return (
            f"pruning pays down to about ratio {made.stops.visual / n:.2g} ({gain:.2g} times faster in all); "
            f"below, {made.stops.bound} dominates"
        )
    share = getattr(full, full.bound) / full.total
    return (
        f"{name}: {full.bound} takes {share:.0%} of the time and is hardly shortened, so the whole gets at most "
        f"{full.total / costs.at(1).total:.3g} times faster; {gain:.3g} times at ratio "
        f"{made.stops.visual / n:.2g}, and below it little more"
    )


def _advice(made: RatioPlan, costs: CostModel) -> list[str]:
    """The plan in sentences."""
    full, n = made.full, costs.visual.placeholders
    out = [
        f"complete ({n} visual tokens): first token after {_time(full.ttft)}, all {made.work.new_tokens} after "
        f"{_time(full.total)}, {readable(full.memory)}; the longest part is {full.bound}"
    ]
    if full.memory > costs.device.memory:
        out.append(f"it needs more memory than {made.device} has ({readable(costs.device.memory)})")
    if made.target is not None and made.limit is not None:
        wanted = f"{made.target} of {_amount(made.target, made.limit)}"
        if made.connector is None:
            least = costs.at(1)
            value = getattr(least, made.target)
            first = "vision" if least.vision >= least.prefill else "prefill"
            cause = {"memory": "weights", "ttft": first}.get(made.target, least.bound)
            out.append(
                f"no ratio reaches a {wanted}: one visual token still takes {_amount(made.target, value)}, "
                f"mostly {cause}"
                + ("; prune inside the tower (encoder stage) or take a smaller picture" if cause == "vision" else "")
            )
        elif made.connector >= n:
            out.append(f"a {wanted} needs no pruning")
        else:
            out.append(
                f"a {wanted} needs ratio {made.connector / n:.3g} or less at the connector stage ({made.connector} "
                f"of {n} tokens)"
            )
            if made.decoder is None:
                out.append(f"the decoder stage from layer {made.decoder_layer} on cannot reach it")
            else:
                out.append(
                    f"at the decoder stage from layer {made.decoder_layer} on: ratio {made.decoder / n:.3g} "
                    f"({made.decoder} tokens)"
                )
    out += _launches(made, costs)
    out.append(_gain(made, costs))
    for other in made.alternatives:
        if other.visual is None or other.estimate is None:
            out.append(f"{other.preset} costs more than {made.preset} complete at any ratio")
        else:
            out.append(
                f"for the same time: {other.preset} with {other.visual} of {other.visual_full} visual tokens "
                f"(ratio {other.visual / other.visual_full:.2g}); larger LLM, fewer tokens tends to win for reasoning "
                f"questions, not for reading text"
            )
    return out
