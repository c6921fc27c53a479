"""Attention of an answer's tokens over the picture, against the maps of eager attention, pruned or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tokprune
from tokprune.cli.app import app
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.testing import TinyVLM, build, picture
from tokprune.viz.answer_map import answer_map

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3")
NEW = 4


def prompt(tiny: TinyVLM, more: str = "?"):  # type: ignore[no-untyped-def]
    return tiny.inputs([["What is ", ("image", picture(60, 40)), more]])


def generated_maps(tiny: TinyVLM, inputs, layer: int) -> tuple[list[Tensor], Tensor]:  # type: ignore[no-untyped-def]
    """(H, keys) row of each generated token as eager attention has it, and the tokens."""
    model = tiny.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    finally:
        model.set_attn_implementation(before)
    return [step[layer][0, :, -1] for step in out.attentions], out.sequences[0]


def hooks_of(tiny: TinyVLM) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny.model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_are_those_of_the_attention_map(family: str) -> None:
    tiny = build(family)
    inputs = prompt(tiny)
    rows, _ = generated_maps(tiny, inputs, 1)
    hooks = hooks_of(tiny)  # transformers leaves its own behind
    for token in (0, 2, -1):
        found = answer_map(tiny.model, tiny.processor, inputs, 1, token, max_new_tokens=NEW)
        with tokprune.apply(tiny.model, "none", ratio=1.0) as pruning:
            tiny.model(**inputs)
            candidates = pruning.last.streams[0].candidates
        torch.testing.assert_close(found.values, rows[token].mean(0)[candidates], atol=1e-5, rtol=1e-4)
        assert "layer 1" in found.source
    assert hooks == hooks_of(tiny)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_under_pruning_kept_tokens_alone_have_values(family: str) -> None:
    tiny = build(family)
    inputs = prompt(tiny)
    with tokprune.apply(tiny.model, "uniform", ratio=0.25) as pruning:
        rows, _ = generated_maps(tiny, inputs, 1)
        found = answer_map(tiny.model, tiny.processor, inputs, 1, 2, max_new_tokens=NEW)
        stream, keep = pruning.last.streams[0], pruning.last.keep[0]
    assert pruning.config.ratio == 0.25
    physical = keep.cumsum(0) - 1
    kept = stream.selection.indices
    seen = torch.zeros(stream.total, dtype=torch.bool)
    seen[kept] = True
    assert torch.equal(~found.values.isnan(), seen)
    expected = rows[2].mean(0)[physical[stream.candidates[kept]]]
    torch.testing.assert_close(found.values[kept], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_inside_the_llm_the_layer_decides_what_was_seen() -> None:
    tiny = build("llava", layers=4)
    inputs = prompt(tiny)
    with tokprune.apply(tiny.model, "fastv", schedule=((2, 0.25),)) as pruning:
        rows, _ = generated_maps(tiny, inputs, 3)
        full = answer_map(tiny.model, tiny.processor, inputs, 1, 1, max_new_tokens=NEW)
        cut = answer_map(tiny.model, tiny.processor, inputs, 3, 1, max_new_tokens=NEW)
        (drop,) = pruning.last.drops
        stream = pruning.last.streams[0]
    assert not full.values.isnan().any()
    left = torch.isin(stream.candidates, drop.columns[0])
    assert int(left.sum()) == 16
    assert torch.equal(~cut.values.isnan(), left)
    place = {int(c): i for i, c in enumerate(drop.columns[0])}
    expected = rows[1].mean(0)[[place[int(c)] for c in stream.candidates[left]]]
    torch.testing.assert_close(cut.values[left], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_flowed_into_a_merged_token_shares_its_value() -> None:
    tiny = build("llava")
    inputs = prompt(tiny)
    with tokprune.apply(tiny.model, "tome_merge", ratio=0.25) as pruning:
        found = answer_map(tiny.model, tiny.processor, inputs, 1, max_new_tokens=NEW)
        stream = pruning.last.streams[0]
    merge, indices = stream.selection.weights, stream.selection.indices
    dense = merge.dense(len(indices), stream.total)
    assert not found.values.isnan().any()
    owner = dense.argmax(0)
    torch.testing.assert_close(found.values, found.values[indices][owner])


@torch.no_grad()
def test_words_are_found_in_the_answer() -> None:
    import tokprune.demo

    model, processor = tokprune.demo.load()
    from tokprune.adapters.prompting import build_inputs
    from tokprune.demo import held_out

    example = held_out(7)[0]
    inputs = build_inputs(model, processor, example.question, images=[example.image])
    first = answer_map(model, processor, inputs, -1)
    word = answer_map(model, processor, inputs, -1, first.answer.split()[0].upper())
    assert torch.equal(first.values, word.values)
    assert word.tokens == first.tokens
    assert first.values.shape == (256,)
    with pytest.raises(OptionError, match="does not hold 'giraffe'"):
        answer_map(model, processor, inputs, -1, "giraffe")
    with pytest.raises(OptionError, match="token 99 does not exist"):
        answer_map(model, processor, inputs, -1, 99)
    with pytest.raises(OptionError, match="picture=1 does not exist"):
        answer_map(model, processor, inputs, -1, picture=1)


@torch.no_grad()
def test_a_cache_method_below_is_refused() -> None:
    tiny = build("llava", layers=4)
    inputs = prompt(tiny)
    with tokprune.apply(tiny.model, "dycoke_cache", layer=2, ratio=0.3):
        with pytest.raises(UnsupportedModelError, match="leaves keys out of layer 3"):
            answer_map(tiny.model, tiny.processor, inputs, 3, 2, max_new_tokens=NEW)
        assert answer_map(tiny.model, tiny.processor, inputs, 1, 2, max_new_tokens=NEW).values.shape == (64,)


def test_the_command_draws_it_pruned_or_not(tmp_path: Path) -> None:
    out = tmp_path / "heat.png"
    scene = Path(__file__).parent.parent.parent / "docs" / "images" / "scene.png"
    line = ["heatmap", "--image", str(scene), "--question", "what color is the star ?", "-o", str(out), "--signals"]
    plain = CliRunner().invoke(app, [*line, "llm_attention:-1:green,llm_question:0"])
    assert plain.exit_code == 0, plain.output
    first = out.read_bytes()
    pruned = CliRunner().invoke(
        app, [*line, "llm_attention:-1,llm_question:0", "--pruned-by", "fastv", "--ratio", "0.2"]
    )
    assert pruned.exit_code == 0, pruned.output
    assert out.read_bytes() != first
    wrong = CliRunner().invoke(app, [*line, "llm_attention"])
    assert "write llm_attention:-1 for the last layer" in str(wrong.exception)
