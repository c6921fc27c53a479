"""Decoder methods in models: what is left computes what masking the rest computes, in prefill and decode steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import HYBRID, slow_unless
from tests.decoder.reference import deep, distance, prompts, run
from tokprune.errors import UnsupportedModelError
from tokprune.testing import FAMILIES, build

ATTENDING = tuple(f for f in FAMILIES if f not in HYBRID)
QUICK = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")
METHODS = {
    "fastv": {"layer": 3, "ratio": 0.25},
    "vtw": {"layer": 3},
    "pyramiddrop": {"layers": (3, 4), "shares": (0.5, 0.1)},
    "fastv-compact": {"schedule": ((3, 0.6), (4, 0.2)), "positions": "compact"},
    "pyramiddrop-keep": {"layers": (3, 4), "shares": (0.5, 0.1), "positions": "keep"},
}
SHORT = (("fastv", "sdpa"), ("pyramiddrop", "eager"))


def options_of(name: str) -> tuple[str, dict[str, Any], bool]:
    """Method, its options, and whether positions are numbered anew."""
    method = name.split("-")[0]
    return method, METHODS[name], name in ("pyramiddrop", "fastv-compact")


@pytest.mark.parametrize(
    ("family", "name", "attn"),
    [
        slow_unless((f in QUICK and (n, a) in SHORT) or (f == "llava" and a == "eager"), f, n, a)
        for f in ATTENDING
        for n in METHODS
        for a in ("sdpa", "eager")
    ],
)
def test_what_is_left_equals_masking(family: str, name: str, attn: str) -> None:
    """A left-padded batch of three, one of words alone, against each prompt alone with the dropped tokens masked."""
    method, options, compact = options_of(name)
    tiny = deep(family, attn)
    inputs = tiny.inputs(prompts(family))
    with tokprune.apply(tiny.model, method, **options) as pruning:
        got = run(tiny, inputs, pruning)
    assert all(int(g[:2].sum()) > 0 and not int(g[2].sum()) for g in got.gone.values())
    assert distance(tiny, inputs, got, compact) < 2e-5


@pytest.mark.parametrize("family", HYBRID)
def test_recurrent_layers_are_refused(family: str) -> None:
    tiny = build(family)
    with pytest.raises(UnsupportedModelError, match="recurrent layers"):
        tokprune.apply(tiny.model, "fastv", layer=1, ratio=0.5)
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in QUICK])
def test_ratio_one_and_remove_change_no_bit(family: str) -> None:
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family))
    before = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "fastv", layer=3, ratio=1.0):
        real = inputs["attention_mask"].bool()
        assert torch.equal(tiny.model(**inputs).logits[real], before[real])
    assert torch.equal(tiny.model(**inputs).logits, before)
