"""A decode step behind pruning as a CUDA graph would record it, without a GPU: the same operations on tensors of the
same shapes at every step of an answer, none of which takes a number from the host or waits for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import tokprune
from tokprune.testing import StandInDevice, TinyVLM, build, device, picture
from tokprune.testing.device import DeviceTensor

pytestmark = pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")

FIRST, SECOND = ("image", picture(60, 40, 1)), ("image", picture(40, 40, 2))
ROWS: list[list[Any]] = [["a ", FIRST, " b"], ["longer x ", SECOND, " y"]]


def told(value: Any) -> Any:
    """What of an operation's argument a recorded graph has in it: shapes of tensors on the device, values of others."""
    if isinstance(value, DeviceTensor):
        return tuple(value.shape), value.stride(), str(value.dtype)
    if isinstance(value, Tensor):
        return "of the host", value.tolist()
    return value


class Steps:
    """The operations of each forward of one new token."""

    def __init__(self) -> None:
        self.made: list[list[tuple[Any, ...]]] = []
        self.open = False

    @contextmanager
    def of(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        original = device.run

        def run(func: Any, args: Any, kwargs: Any, cost: Any) -> Any:
            if self.open:
                self.made[-1].append((func._schema.name, *tree_map(told, (tuple(args), dict(kwargs)))))
            return original(func, args, kwargs, cost)

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            self.open = kwargs["input_ids"] is not None and kwargs["input_ids"].shape[1] == 1
            if self.open:
                self.made.append([])

        def end(module: Any, args: Any, output: Any) -> None:
            self.open = False

        monkeypatch.setattr(device, "run", run)
        hooks = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def recorded(tiny: TinyVLM, inputs: Any, method: str | None, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The operations of each step's forward in an answer of six tokens over a static cache."""
    steps = Steps()
    pruning = tokprune.apply(tiny.model, method, ratio=0.3) if method else nullcontext()
    with monkeypatch.context() as patch, pruning, steps.of(tiny.model, patch):
        tiny.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, cache_implementation="static")
    assert len(steps.made) == 5
    return steps.made


def varying(made: list[list[Any]]) -> Counter[str]:
    """Operations that are not the same in every step but the first, which may fill caches."""
    assert len({len(step) for step in made[1:]}) == 1
    return Counter(first[0] for first, *others in zip(*made[1:], strict=True) if any(o != first for o in others))


def of_the_host(made: list[list[Any]]) -> Counter[str]:
    """Operations that take a number from the host, or give it one."""
    wait = ("_local_scalar_dense", "_to_copy", "nonzero")
    return Counter(op[0] for op in made[-1] if "of the host" in str(op) or op[0].endswith(wait))


@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_5_vl", "internvl"))]
)
def test_the_forward_of_a_step_is_the_same_each_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build(family)
    with torch.no_grad(), StandInDevice() as stand_in:
        stand_in.move(tiny.model)
        inputs = stand_in.put(dict(tiny.inputs(ROWS)))
        plain, pruned = (recorded(tiny, inputs, method, monkeypatch) for method in (None, "random"))
    assert not varying(pruned) - varying(plain)
    assert not of_the_host(pruned) - of_the_host(plain)
    assert len(pruned[-1]) == len(plain[-1])  # mask and positions are made in front of it


def test_a_wait_or_a_changing_shape_in_a_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")
    with torch.no_grad(), StandInDevice() as stand_in:
        stand_in.move(tiny.model)
        inputs = stand_in.put(dict(tiny.inputs(ROWS)))
        plain = recorded(tiny, inputs, "random", monkeypatch)
        seen = torch.zeros(1, device=StandInDevice.device)

        def leaky(module: Any, args: Any) -> None:
            nonlocal seen
            seen = torch.cat([seen, seen[:1]])
            seen.max().item()

        with_leak = tiny.model.lm_head.register_forward_pre_hook(leaky)
        found = recorded(tiny, inputs, "random", monkeypatch)
        with_leak.remove()
    assert varying(found) - varying(plain) == Counter({"aten::slice": 1, "aten::cat": 1, "aten::max": 1})
    assert of_the_host(found) - of_the_host(plain) == Counter({"aten::_local_scalar_dense": 1})
