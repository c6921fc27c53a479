"""Encoder and connector stage in one model: one budget, the same features, and the model back untouched."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.budget import kept
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, picture

FAMILIES = ("llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3")
SINGLE_GRID = ("llava", "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3")  # no unpadding: every group keeps its place


def given(family):
    tiny = build(family)
    rows = [
        ["a ", ("image", picture(60, 40, 1)), " b"],
        ["x ", ("image", picture(40, 40, 2)), " y ", ("image", picture(40, 70, 3)), " z"],
    ]
    return tiny, tiny.inputs(rows)


def seen_by_llm(tiny, inputs):
    """(B, L, D) embeddings that the language model receives in one forward."""
    seen = []
    handle = tiny.model.base_model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    try:
        tiny.model(**inputs)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_encoder_alone_hands_one_token_per_group_to_the_llm(family):
    tiny, inputs = given(family)
    before = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "tome", ratio=0.5) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=3)
        pruned = seen_by_llm(tiny, inputs)
        last = pruning.last
        assert all(0 < s.kept < s.total for s in last.streams)
        if family in SINGLE_GRID:
            assert [s.kept for s in last.streams] == [kept(s.total, 0.5) for s in last.streams]
        assert "tome" in str(pruning.report())
    with apply_encoder(tiny.model, "tome", ratio=0.5):
        full = seen_by_llm(tiny, inputs)
    for row in range(2):  # filler stands left
        keep = last.keep[row]
        assert torch.allclose(pruned[row, -int(keep.sum()) :], full[row][keep], atol=1e-5)
    assert torch.equal(tiny.model(**inputs).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_stages_share_the_connectors_budget(family):
    tiny, inputs = given(family)
    before = tiny.model(**inputs).logits
    stages = [tokprune.get_method("tome", r=2), "divprune"]
    with tokprune.apply(tiny.model, stages, ratio=0.2) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=3)
        pruned = seen_by_llm(tiny, inputs)
        last = pruning.last
        assert [s.kept for s in last.streams] == [kept(s.total, 0.2) for s in last.streams]
    with apply_encoder(tiny.model, "tome", r=2):
        full = seen_by_llm(tiny, inputs)
    for row in range(2):
        keep = last.keep[row]
        assert torch.allclose(pruned[row, -int(keep.sum()) :], full[row][keep], atol=1e-5)
    assert torch.equal(tiny.model(**inputs).logits, before)


@pytest.mark.parametrize("method", ["tome", "tofu"])
@torch.no_grad()
def test_a_method_without_a_schedule_reduces_by_the_same_factor_as_the_connector(method):
    """What the pages call `tome+divprune`: no option is needed, the count is exact, and ratio 1 changes nothing."""
    tiny, inputs = given(FAMILIES[0])
    before = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, [method, "divprune"], ratio=0.25) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=2)
        assert [s.kept for s in pruning.last.streams] == [kept(s.total, 0.25) for s in pruning.last.streams]
        assert pruning.encoder.ratio == 0.5
    with tokprune.apply(tiny.model, [method, "divprune"], ratio=1.0):
        assert torch.equal(tiny.model(**inputs).logits, before)
    with pytest.raises(OptionError, match="r=8"):
        tokprune.apply(tiny.model, [method, "divprune"], budget=2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_reduced_is_bit_identical(family):
    tiny, inputs = given(family)
    before = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "tome", ratio=1.0):
        assert torch.equal(tiny.model(**inputs).logits, before)
    with tokprune.apply(tiny.model, [tokprune.get_method("tome", r=0), "divprune"], ratio=1.0):
        assert torch.equal(tiny.model(**inputs).logits, before)


def test_a_tower_that_cannot_be_reduced_is_refused():
    with pytest.raises(UnsupportedModelError, match="Pixtral"):
        tokprune.apply(build("mistral3").model, "tome", ratio=0.5)
