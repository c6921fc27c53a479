"""Signals of the LLM: equal to the maps of eager attention, whatever stands around them; and nothing is left behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tokprune
from tests.spelling import cache_in, with_cache
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.profiling.flops import stage_flops
from tokprune.registry import MethodInfo
from tokprune.testing import build, picture
from tokprune.tokens import Selection, VisualTokens

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")
LAYER = 1


@dataclass(frozen=True)
class Seeing(ConnectorMethod):
    """Keeps the first tokens, and what it saw of the LLM."""

    info: ClassVar[MethodInfo] = MethodInfo("seeing", "for tests")
    needs: ClassVar[tuple[str, ...]] = tuple(
        f"{kind}:{LAYER}" for kind in ("llm_attention", "llm_logits", "llm_question")
    )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        seen = {name.partition(":")[0]: tokens.signal(name) for name in self.needs}
        return Selection(torch.arange(keep, device=tokens.features.device), info=seen)


def rows() -> list[list[object]]:
    return [
        ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
        ["Longer text before ", ("image", picture(40, 40, 2)), " and ", ("image", picture(40, 70, 3)), " compare."],
    ]


def maps_of(model, inputs) -> Tensor:  # type: ignore[no-untyped-def]
    """(B, H, L, L) attention of the layer, as eager attention computes it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(**inputs, output_attentions=True, use_cache=False).attentions[LAYER]
    finally:
        model.set_attn_implementation(before)


def expected(maps: Tensor, ids: Tensor, visual: set[int], stream) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """What the signals of a stream are, cut out of the map."""
    row, columns = maps[stream.row], stream.candidates
    last_visual = max(i for i, token in enumerate(ids[stream.row].tolist()) if token in visual)
    return {
        "llm_attention": row[:, -1, columns].mean(0),
        "llm_question": row[:, last_visual + 1 :, columns].mean(1).T,
    }


def check(pruning, maps: Tensor, inputs, model) -> None:  # type: ignore[no-untyped-def]
    visual = {model.config.image_token_id}
    for stream in pruning.last.streams:
        seen = stream.selection.info
        for name, value in expected(maps, inputs["input_ids"], visual, stream).items():
            torch.testing.assert_close(seen[name], value, atol=1e-5, rtol=1e-4, msg=f"{name} of row {stream.row}")
        assert seen["llm_logits"].shape == (stream.total,)
        assert "layer 1 of the LLM" in stream.sources[f"llm_attention:{LAYER}"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_signals_equal_the_attention_maps(family: str, kernel: str) -> None:
    tiny = build(family)
    inputs = tiny.inputs(rows())
    maps = maps_of(tiny.model, inputs)
    tiny.model.set_attn_implementation(kernel)
    with tokprune.apply(tiny.model, Seeing(), ratio=0.4) as pruning:
        tiny.model(**inputs)
        check(pruning, maps, inputs, tiny.model)
        tiny.model.generate(**inputs, max_new_tokens=2)
        check(pruning, maps, inputs, tiny.model)
        tiny.model.generate(**inputs, max_new_tokens=2, num_beams=2)
        assert len(pruning.last.streams) == 6
        tiny.model.generate(**inputs, max_new_tokens=3, use_cache=False, do_sample=False)  # each step reads all anew
        check(pruning, maps, inputs, tiny.model)


@torch.no_grad()
def test_logits_are_what_the_softmax_gets() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(rows()[:1])
    (row,) = maps_of(tiny.model, inputs)[:, :, -1]  # (H, L)
    with tokprune.apply(tiny.model, Seeing(), ratio=0.4) as pruning:
        tiny.model(**inputs)
        (stream,) = pruning.last.streams
        logits = stream.selection.info["llm_logits"]
    logarithms = row[:, stream.candidates].log().mean(0)  # up to what the heads' softmaxes are divided by
    torch.testing.assert_close(logits - logits[0], logarithms - logarithms[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_later_turn_sees_the_pruned_earlier_one() -> None:
    tiny = build("llava")
    first, both = rows()[0], [*rows()[0], " yes. ", ("image", picture(50, 50, 4)), " and this?"]
    one, two = tiny.inputs([first]), tiny.inputs([both])
    split = one["input_ids"].shape[1]
    with tokprune.apply(tiny.model, Seeing(), ratio=0.4) as pruning:
        out = tiny.model(**one, use_cache=True)
        keep = pruning.last.keep[0]
        call = {**two, "input_ids": two["input_ids"][:, split:], "pixel_values": two["pixel_values"][1:]}
        cache = cache_in(out)
        keys = [layer.keys.clone() for layer in cache.layers]
        again = copy.deepcopy(cache)
        after = tiny.model(**call, **with_cache(cache))
        seen = pruning.last.streams[0].selection.info
        reference = tiny.model(**call, **with_cache(again))
    torch.testing.assert_close(after.logits, reference.logits)
    assert all(torch.equal(layer.keys[:, :, : k.shape[2]], k) for layer, k in zip(cache.layers, keys, strict=True))
    # By hand: the whole conversation without the dropped columns of the first picture, positions numbered anew.
    embeds = tiny.model.get_input_embeddings()(two["input_ids"])
    features = torch.cat(list(tiny.model.base_model.get_image_features(two["pixel_values"]).pooler_output))
    where = two["input_ids"][0] == tiny.model.config.image_token_id
    embeds[0, where] = features
    stay = torch.cat([keep, torch.ones(two["input_ids"].shape[1] - split, dtype=torch.bool)])
    tiny.model.set_attn_implementation("eager")
    text = tiny.model.base_model.language_model
    row = text(inputs_embeds=embeds[:, stay], output_attentions=True).attentions[LAYER][0, :, -1].mean(0)
    candidates = (where & (torch.arange(len(where)) >= split))[stay]
    torch.testing.assert_close(seen["llm_attention"], row[candidates], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_pass_is_a_part_of_the_choice_and_leaves_nothing() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(rows()[:1])
    plain = tiny.model(**inputs).logits
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny.model.modules()]
    with tokprune.apply(tiny.model, Seeing(), ratio=0.4):
        ahead = stage_flops(tiny.model, inputs)
    with tokprune.apply(tiny.model, "uniform", ratio=0.4):
        without = stage_flops(tiny.model, inputs)
    assert (ahead.prefill, ahead.decode, ahead.vision) == (without.prefill, without.decode, without.vision)
    assert ahead.select > without.select  # layer 0 on the whole prompt
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny.model.modules()]
    assert torch.equal(tiny.model(**inputs).logits, plain)
    with tokprune.apply(tiny.model, Seeing(), ratio=1.0):
        assert torch.equal(tiny.model(**inputs).logits, plain)


def test_layers_that_are_none_are_refused_before_anything_is_put_on() -> None:
    tiny = build("llava")
    with pytest.raises(OptionError, match="the LLM has 2 blocks"):
        tokprune.apply(tiny.model, "gemfilter", layer=7, ratio=0.5)
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())


@torch.no_grad()
def test_an_error_in_the_pass_leaves_the_model_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("llava")
    inputs = tiny.inputs(rows()[:1])
    with tokprune.apply(tiny.model, "gemfilter", layer=1, ratio=0.4) as pruning:
        expected = tiny.model(**inputs).logits
        broken = tiny.model.base_model.language_model.layers[0].mlp
        with monkeypatch.context() as patch:
            patch.setattr(broken, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tiny.model(**inputs)
        assert torch.equal(tiny.model(**inputs).logits, expected)
        assert pruning.last.streams[0].kept < pruning.last.streams[0].total
