"""Exact FLOPs per stage of a real or meta model: every matrix product, attention and convolution that torch runs.

A multiply-add counts as 2 FLOPs. Counted are matrix products, convolutions and attention (its full square: torch
computes masked halves too, or skips them by kernel); element-wise work is not. The papers' own formulas, which leave
out other things, are in `formulas`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tokprune.profiling.stages import StageModules, find_stages, watch
from tokprune.types import Inputs, JsonObject


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one call, per stage; decode is one step. `operators` splits the sum of the call by torch operator."""

    vision: int
    projector: int
    select: int
    prefill: int
    decode: int
    operators: Mapping[str, int] = field(default_factory=dict)
    unit: str = "FLOPs"

    def total(self, new_tokens: int = 1) -> int:
        """FLOPs from pixels to `new_tokens` generated tokens; the first comes with the prefill, later steps cost
        `decode` each.

        Decode steps grow by a few FLOPs per cached token; the first step's cost is taken for all of them.
        """
        return self.vision + self.projector + self.select + self.prefill + max(new_tokens - 1, 0) * self.decode

    def to_dict(self) -> JsonObject:
        """Plain data for a report."""
        parts = {name: getattr(self, name) for name in ("vision", "projector", "select", "prefill", "decode")}
        return {"unit": self.unit, **parts, "operators": dict(self.operators)}


def new_counter() -> FlopCounterMode:
    """torch's counter, with the attention kernels that the installed torch has but does not count: they would give 0.

    torch 2.14 and older leave out the kernel of CPUs and those of mps and of other makers' devices.
    The counter of the caller alone knows them; torch's own table stays as it is.
    """
    missing = {}
    for names, formula in ((FORWARD_KERNELS, _attention_flops), (BACKWARD_KERNELS, _attention_backward_flops)):
        for name in names:
            kernel = getattr(torch.ops.aten, name, None)
            if kernel is not None and kernel not in flop_registry:
                missing[kernel] = formula
    return FlopCounterMode(display=False, custom_mapping=missing)


FORWARD_KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
BACKWARD_KERNELS = tuple(f"{name}_backward" for name in FORWARD_KERNELS[:-1])


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """Both products of attention, 2 per multiply-add, from the shapes (B, H, S, D); every query head counts."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


def _attention_backward_flops(
    grad: object, query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object
) -> int:
    """The five products behind it: scores made again, gradients of query, key, value and of the probabilities."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (3 * width + 2 * value[-1])


def count(call: Callable[[], object]) -> tuple[int, dict[str, int]]:
    """FLOPs of `call()`, and their split by torch operator. Works on any device, the meta device included."""
    with torch.no_grad(), new_counter() as counter:
        call()
    return counter.get_total_flops(), _operators(counter)


def _operators(counter: FlopCounterMode) -> dict[str, int]:
    total = counter.get_flop_counts().get("Global", {})
    return {str(op).removeprefix("aten."): int(n) for op, n in sorted(total.items(), key=lambda kv: -kv[1])}


class _Booking:
    """Books the counter's growth under the innermost stage that is open, and under `outside` when none is."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.open = ["outside"]
        self.seen = 0
        self.prefills = 0  # language model calls so far: the first is the prefill, the second a decode step
        self.booked: Counter[str] = Counter()

    def settle(self) -> None:
        now = self.counter.get_total_flops()
        self.booked[self.open[-1]] += now - self.seen
        self.seen = now

    def enter(self, part: str) -> None:
        self.settle()
        if part == "language":
            self.prefills += 1
        self.open.append(("prefill" if self.prefills <= 1 else "decode") if part in ("language", "head") else part)

    def leave(self, part: str) -> None:
        self.settle()
        self.open.pop()


def _booked(stages: StageModules, call: Callable[[], object]) -> tuple[Counter[str], dict[str, int]]:
    """FLOPs of `call()` by stage, 0 for those that did not run, and by torch operator."""
    with torch.no_grad(), new_counter() as counter:
        booking = _Booking(counter)
        with watch(stages, booking.enter, booking.leave):
            call()
        booking.settle()
    return booking.booked, _operators(counter)


def stage_flops(model: nn.Module, inputs: Inputs, stages: StageModules | None = None) -> StageFlops:
    """FLOPs of `model.generate(**inputs)` by stage, the decode stage being the second token's step.

    The call is really made (greedy, two new tokens) with whatever pruning is applied to the model, so the count is of
    what runs: a selection's own products appear under `select`. Not for meta models: see `vision_flops`.
    """
    generate: Callable[..., object] = model.generate  # type: ignore[assignment]
    greedy = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1}
    b, operators = _booked(stages or find_stages(model), lambda: generate(**inputs, **greedy))
    return StageFlops(b["vision"], b["projector"], b["outside"], b["prefill"], b["decode"], operators)


def vision_flops(encode: Callable[[], object], stages: StageModules) -> tuple[int, int]:
    """FLOPs of the vision tower and of the projector while `encode()` runs, such as a call of `get_image_features`.

    Work outside both modules (pooling, pixel shuffle: no products) is booked under the projector.
    """
    b, _ = _booked(stages, encode)
    return b["vision"], b["projector"] + b["outside"]
