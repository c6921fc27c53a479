"""What the decoder stage costs: operations and waits of decode steps and of the prefill, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokprune
from tests.adapters.reference import slow_unless
from tests.decoder.reference import deep, prompts
from tokprune.testing import TinyVLM

METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 3, "ratio": 0.25},
    "pyramiddrop": {"layers": (2, 3, 4), "shares": (0.5, 0.25, 0.1)},
}
WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "tolist")


class Counting(TorchDispatchMode):
    """Counts what torch is asked to do; reading a tensor on the host is a wait, by whichever way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            self.seen["tolist"] += 1
            return tolist(tensor)

        monkeypatch.setattr(Tensor, "tolist", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(tiny: TinyVLM, inputs: Any, new: int) -> Counter[str]:
    with pytest.MonkeyPatch.context() as patch, Counting(patch) as count:
        tiny.model.generate(**inputs, max_new_tokens=new)
    return count.seen


TORCH_NOW = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)


def per_step(tiny: TinyVLM, inputs: Any) -> Counter[str]:
    """Of four decode steps."""
    few, more = counted(tiny, inputs, 3), counted(tiny, inputs, 7)
    return Counter({name: more[name] - few[name] for name in more})


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in ("llava", "qwen2_5_vl", "gemma3")])
def test_a_step_without_padding_costs_next_to_nothing(family: str, attn: str) -> None:
    """No wait more than the unpruned model has, two operations more in all (three in torch 2.6); under eager attention
    one for each drop and kind of mask besides, since masks must be cut.
    """
    tiny = deep(family, attn)
    inputs = tiny.inputs(prompts(family)[:1])
    plain = per_step(tiny, inputs)
    for name, options in METHODS.items():
        with tokprune.apply(tiny.model, name, **options) as pruning:
            got = per_step(tiny, inputs)
            drops = len(pruning.last.drops)
        assert all(got[wait] == plain[wait] for wait in WAITS)
        more = (got.total() - plain.total()) / 4
        allowed = 2 if TORCH_NOW else 3
        assert more <= allowed + (0 if attn == "sdpa" else drops * (2 if family == "gemma3" else 1))
        assert more <= 5 * drops


@pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in ("llava", "qwen2_5_vl")])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_prefill_waits_once_for_each_drop(family: str, rows: int) -> None:
    """Beside what the connector stage waits for: twice in all (how many tokens there are, which one is last), once for
    each drop, and once where a prompt has several pictures.
    """
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:rows])
    with tokprune.apply(tiny.model, "random", ratio=0.95):
        before = counted(tiny, inputs, 1)
    for layers in ((3,), (2, 3, 4)):
        schedule = tuple((layer, 0.9 / (i + 1)) for i, layer in enumerate(layers))
        with tokprune.apply(tiny.model, "fastv", schedule=schedule) as pruning:
            got = counted(tiny, inputs, 1)
        assert len(pruning.last.drops) == len(layers)
        waits = {name: got[name] - before[name] for name in WAITS}
        assert 0 < waits["tolist"] <= 2 + len(layers) + (rows - 1)
        # Off the CPU, finite scores are asked for and ties are sorted; here both are told by the data.
        asked = len(layers) * (2 if rows == 2 else 1)
        assert waits["aten._local_scalar_dense.default"] <= asked + 1
