"""Encoder stage, then connector stage: only one token of each group goes on, and the budget is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image

import tokprune
from tests.encoder.test_vlm_towers import encode, rows, two_images
from tokprune.adapters.families import EncoderCall, stream_layouts
from tokprune.methods.base import ConnectorMethod, Wrapper
from tokprune.methods.connector.divprune import DivPrune
from tokprune.registry import MethodInfo, get_method
from tokprune.runtime.encoder import apply_encoder
from tokprune.runtime.encoder.handoff import SIGNAL, AmongSurvivors, survivor_rows
from tokprune.testing import build, picture
from tokprune.tokens import Layout, Merge, Selection, VisualTokens

FAMILIES = ("llava", "llava_next", "internvl", "gemma3", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_survivors_line_up_with_the_features(family: str) -> None:
    tiny = build(family)
    inputs = two_images(tiny)
    names: dict[str, Any] = {k: inputs[k] for k in ("pixel_values", "image_grid_thw", "image_sizes") if k in inputs}
    with apply_encoder(tiny.model, "tome", ratio=0.4) as pruning:
        output = encode(tiny, inputs)
    call = EncoderCall(tiny.model.base_model, "image", names, output)
    flat, place = rows(output.pooler_output), survivor_rows(pruning.encoder, call) > 0
    assert place.shape == flat.shape[:1]
    unique = torch.unique((flat * 1e4).round(), dim=0).shape[0]
    if family == "llava_next":  # unpadding drops rows, newlines are added
        assert len(stream_layouts(tiny.model.base_model, "image", names, output)) == 2
        assert 0 < int(place.sum()) < int(pruning.trace.survivor.sum())
        return
    assert int(place.sum()) == int(pruning.trace.survivor.sum())
    assert torch.unique((flat[place] * 1e4).round(), dim=0).shape[0] == int(place.sum())  # no two alike
    assert unique == int(place.sum())  # and none is missing


def stream() -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 6, generator=generator)
    alive = torch.zeros(24)
    alive[torch.randperm(24, generator=generator)[:11]] = 1
    return VisualTokens(features, Layout.grid(4, 6), {SIGNAL: alive})


def test_choice_among_survivors_is_the_choice_of_the_part() -> None:
    tokens = stream()
    place = tokens.signals[SIGNAL].nonzero()[:, 0]
    got = AmongSurvivors(DivPrune()).select(tokens, 5)
    expected = place[DivPrune().select(tokens.part(place), 5).indices]
    assert torch.equal(got.indices, expected)
    assert len(AmongSurvivors(DivPrune()).select(tokens, 20)) == 11
    assert torch.equal(AmongSurvivors().select(tokens, 3).indices, place)


@pytest.mark.parametrize("dense", [True, False])
def test_merge_weights_of_the_part_are_those_of_the_stream(dense: bool) -> None:
    tokens = stream()
    place = tokens.signals[SIGNAL].nonzero()[:, 0]
    target = torch.arange(len(place)) % 3
    merge = Merge(target, torch.full((len(place),), 0.5))
    inner = Selection(torch.arange(3), Merge(rows=merge.dense(3, len(place))) if dense else merge)
    outer = AmongSurvivors.outward(inner, place, len(tokens))
    torch.testing.assert_close(outer.apply(tokens.features), inner.apply(tokens.features[place]))


@dataclass(frozen=True)
class Seen(Wrapper):
    """Remembers what it was asked."""

    method: ConnectorMethod
    asked: list[Any] = field(default_factory=list)
    info = MethodInfo("seen", "a wrapper that remembers")

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        self.asked.append((batch, list(keeps)))
        return super().budgets(batch, keeps)


@pytest.mark.parametrize("rule", ["adaptive_budget", "catp"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
@torch.no_grad()
def test_images_share_a_budget_by_the_methods_rule_behind_an_encoder_method(family: str, rule: str) -> None:
    tiny = build(family)
    plain = Image.new("RGB", (60, 60), "gray")
    inputs = tiny.inputs([["a ", ("image", plain), " or ", ("image", picture(60, 60)), "?"]])
    seen = Seen(get_method(rule))  # type: ignore[arg-type]
    methods = [get_method("tome", r=1), seen]
    with tokprune.apply(tiny.model, methods, ratio=0.3, processor=tiny.processor, query="which one?") as pruning:
        tiny.model(**inputs)
        counts = [stream.kept for stream in pruning.last.streams]
    ((batch, before),) = seen.asked
    assert counts == seen.method.budgets(batch, before)
    assert sum(counts) == sum(before)
    assert counts != before, "the rule had nothing to say here"
