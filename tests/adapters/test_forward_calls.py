"""forward() of pruned models: what it returns, and inputs of other kinds."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import tokprune
from tests.adapters.reference import (
    QUICK,
    apart,
    observe,
    prompt,
    prompt_of,
    reference,
    run,
    samples,
    slow_unless,
)
from tests.adapters.shortened import RATIO, TOLERANCE
from tokprune.testing import FAMILIES, build, clip

# -- outputs and inputs of other kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in (*QUICK, "gemma3", "qwen3_5")])
def test_hidden_states_have_the_length_of_the_prompt(family: str) -> None:
    case = prompt(family)
    model, length = case.tiny.model, case.real.shape[1]
    with tokprune.apply(model, "random", ratio=RATIO) as pruning, torch.no_grad():
        out = model(**case.inputs, output_hidden_states=True)
        plain = model(**case.inputs)
        generated = model.generate(
            **case.inputs, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True
        )
    keep = pruning.last.keep
    assert len(out.hidden_states) == model.config.get_text_config().num_hidden_layers + 1
    assert all(h.shape[1] == length for h in out.hidden_states)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    embeds = torch.stack([case.forward.embeds[row, keep[row]][-4:] for row in range(len(keep))])
    assert torch.equal(out.hidden_states[0][:, -4:], embeds), "the first ones are the embeddings"
    for row in range(len(keep)):  # a dropped column answers with the nearest kept one before it
        for column in (~keep[row] & case.visual[row]).nonzero().flatten().tolist():
            before = int(keep[row, :column].nonzero()[-1])
            assert torch.equal(out.logits[row, column], out.logits[row, before])
    assert len(generated.hidden_states) == 3
    assert generated.hidden_states[1][0].shape[1] == 1


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_logits_to_keep_and_tuples(family: str) -> None:
    case = prompt(family)
    model = case.tiny.model
    with torch.no_grad():
        heeded = model(**case.inputs, logits_to_keep=3).logits.shape[1] == 3  # some models ignore it
    with tokprune.apply(model, "random", ratio=RATIO), torch.no_grad():
        whole = model(**case.inputs).logits
        if not heeded:
            assert torch.equal(model(**case.inputs, logits_to_keep=3).logits, whole)
            return
        assert apart(model(**case.inputs, logits_to_keep=3).logits, whole[:, -3:]) < TOLERANCE
        some = torch.tensor([0, 5, whole.shape[1] - 1])
        assert apart(model(**case.inputs, logits_to_keep=some).logits, whole[:, some]) < TOLERANCE
        answer = model(**case.inputs, return_dict=False)
    assert isinstance(answer, tuple)
    assert torch.equal(answer[0], whole)


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_half_precision(family: str) -> None:
    tiny = build(family, dtype=torch.bfloat16)
    inputs = tiny.inputs(samples("image"))
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "divprune", ratio=RATIO, positions=positions) as pruning:
            got = run(tiny, inputs)
        keep = pruning.last.keep
        assert got.logits.dtype == torch.bfloat16
        answer = reference(tiny, observe(tiny, inputs), keep, positions, got.tokens[:, :-1])
        mine = torch.cat([got.steps[:, 0], got.steps[:, 1:].flatten(0, 1)]).float()
        theirs = torch.cat([torch.stack([p[-1] for p in answer.prompt]), answer.steps.flatten(0, 1)]).float()
        alike = torch.nn.functional.cosine_similarity(mine, theirs, dim=-1)
        assert (alike > 0.995).all(), alike


@pytest.mark.parametrize("family", [*QUICK, "gemma3"])
def test_inputs_embeds_beside_pixels(family: str) -> None:
    case = prompt(family)
    model = case.tiny.model
    rest = {k: v for k, v in case.inputs.items() if k != "input_ids"}
    embeds = model.get_input_embeddings()(case.inputs["input_ids"]).detach()
    if case.forward.mrope:  # transformers cannot find the pictures' places without ids
        rest["position_ids"] = case.forward.positions
    with torch.no_grad():
        native = model(inputs_embeds=embeds, **rest).logits
        assert apart([native[case.real]], [case.unpruned.logits[case.real]]) < TOLERANCE
        with tokprune.apply(model, "random", ratio=RATIO) as pruning:
            got = model(inputs_embeds=embeds, **rest).logits
            keep = pruning.last.keep
            wanted = model(**case.inputs).logits
            assert torch.equal(keep, pruning.last.keep)
            assert apart([got[keep]], [wanted[keep]]) < TOLERANCE
            if not case.forward.mrope and family != "gemma3":  # gemma3 does not take them in generate()
                new = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=4)
                assert torch.equal(new, model.generate(**case.inputs, max_new_tokens=4)[:, -4:])


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_features_encoded_before_apply(family: str) -> None:
    """Features that the user encoded earlier are pruned too; only their geometry is unknown."""
    case = prompt(family)
    model = case.tiny.model
    names = inspect.signature(model.base_model.get_image_features).parameters
    with torch.no_grad():
        output = model.base_model.get_image_features(
            **{k: v for k, v in case.inputs.items() if k in names}, return_dict=True
        )
    rest = {k: v for k, v in case.inputs.items() if k != "pixel_values"}
    for positions in ("keep", "compact"):
        with tokprune.apply(model, "divprune", ratio=RATIO, positions=positions) as pruning, torch.no_grad():
            logits = model(**rest, mm_encoder_outputs={"image": output}).logits
            keep = pruning.last.keep
            assert all("geometry" in record.note for record in pruning.last.streams)
            tokens = model.generate(**rest, mm_encoder_outputs={"image": output}, max_new_tokens=5)[:, -5:]
            assert torch.equal(pruning.last.keep, keep)
        prompt_logits = reference(case.tiny, case.forward, keep, positions, tokens[:, :0]).prompt
        assert apart([logits[row][keep[row]] for row in range(2)], prompt_logits) < TOLERANCE
        answer = reference(case.tiny, case.generate, keep, positions, tokens[:, :-1])
        steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)
        assert torch.equal(steps[..., :256].argmax(-1), tokens)


def test_clip_that_the_model_itself_thins_out() -> None:
    """VideoLLaMA 3 drops repeated patches of a still clip; pruning chooses among the rest."""
    tiny = build("video_llama_3")
    still = np.repeat(clip(1, seed=1), 4, axis=0)
    parts = [["v ", ("video", still), " what?"], ["a longer ", ("video", clip(4, seed=2)), " ok?"]]
    case = prompt_of(tiny, parts)
    assert int(case.visual[0].sum()) < int(case.visual[1].sum())
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "divprune", ratio=RATIO, positions=positions) as pruning:
            got = run(tiny, case.inputs)
        assert [r.total for r in pruning.last.streams] == case.visual.sum(1).tolist()
        assert case.distance(pruning.last.keep, positions, got) < TOLERANCE
