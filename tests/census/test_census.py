"""Every model type that transformers maps to a multimodal model: it works, proven by brute force, or apply() refuses it
with the reason, or it is no VLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import tokprune
from tests.adapters.reference import slow_unless
from tests.census import proof, states
from tests.census.census import prove
from tests.census.models import model_class, model_types, tiny_config, tiny_model
from tests.census.pixels import prompts
from tokprune.adapters.known import NOT_VISUAL, REFUSED, VERIFIED, refusal
from tokprune.errors import UnsupportedModelError

QUICK = ("glm46v", "lfm2_vl", "exaone4_5")  # clips written with the token of pictures, a hybrid LLM, positions by hand


NOT_BUILT = ("qwen3_omni_moe", "nemo_speechlm")  # their default configs do not make a model, small or large


def test_every_type_is_decided() -> None:
    open_ones = [name for name, state in states.STATES.items() if state == "untested"]
    assert not open_ones, (
        f"transformers has model types that nobody has decided about: {open_ones}. Run python -m benchmarks.census "
        "--only NAME; then name them in VERIFIED, REFUSED or NOT_VISUAL of tokprune/adapters/known.py"
    )


def test_a_new_type_is_untested() -> None:
    assert states.state("a_type_of_tomorrow") == "untested"


def test_no_type_stands_in_two_lists() -> None:
    assert not set(VERIFIED) & (set(REFUSED) | set(NOT_VISUAL))
    assert not set(REFUSED) & set(NOT_VISUAL)


@pytest.mark.parametrize("model_type", [slow_unless(name in QUICK, name) for name in VERIFIED])
def test_works(model_type: str) -> None:
    if model_type not in model_types():
        pytest.skip("the installed transformers does not map this type")
    prove(model_type)


def refused_types() -> Iterator[Any]:
    mapped = model_types()
    for name in (*REFUSED, *NOT_VISUAL):
        if name in mapped:
            yield name


@pytest.mark.parametrize("model_type", refused_types())
def test_refused_at_apply(model_type: str) -> None:
    if model_type in NOT_BUILT:
        assert refusal(CONFIG_MAPPING[model_type]())
        return
    with torch.device("meta"):
        model = model_class(model_type)(tiny_config(model_type))
    with pytest.raises(UnsupportedModelError) as refused:
        tokprune.apply(model, "divprune", ratio=0.5)
    assert "cannot be pruned" in str(refused.value)
    assert model_type in NOT_VISUAL or "Instead:" in str(refused.value)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["ColPali", "ColQwen2", "ColModernVBert"])
def test_retrieval_models_are_refused(name: str) -> None:
    import transformers

    kind = getattr(transformers, f"{name}Config").model_type
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForRetrieval")(tiny_config(kind))
    with pytest.raises(UnsupportedModelError, match="a vector for every token of a page"):
        tokprune.apply(model, "divprune", ratio=0.5)


def test_a_loss_inside_a_pruned_base_is_refused() -> None:
    """Nemotron Omni has its head in the class that is pruned; labels would be compared with logits of kept tokens."""
    model = tiny_model("nemotron_h_omni")
    inputs = prompts(model, [["a ", ("image", 1), " b?"]])
    with tokprune.apply(model, "random", ratio=0.4), torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
        for more in ({"labels": inputs["input_ids"]}, {"logits_to_keep": 3}):
            with pytest.raises(UnsupportedModelError, match="computes logits inside"):
                model(**inputs, **more)
    assert model(**inputs, labels=inputs["input_ids"]).loss is not None


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_sound_beside_a_picture_stays_whole(model_type: str, positions: str) -> None:
    model = tiny_model(model_type)
    config = model.config
    sound = torch.randn(1, config.audio_config.num_mel_bins, 64, generator=torch.Generator().manual_seed(1))
    heard = torch.ones(1, 64, dtype=torch.long)
    with torch.no_grad():
        count = model.base_model.get_audio_features(sound, heard).last_hidden_state.flatten(0, -2).shape[0]
    mark, start = config.audio_token_id, config.audio_start_token_id
    words = prompts(model, [["a ", ("image", 1), " and a sound, which is louder?"]])
    ids = torch.cat([torch.tensor([[65, start, *[mark] * count, 303, 66]]), words["input_ids"]], 1)
    inputs = {**words, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"input_features": sound, "feature_attention_mask": heard}
    with proof.pruned(model, positions=positions) as pruning:
        got = proof.answer(model, inputs)
        keep = pruning.last.keep[0]
    assert keep[ids[0] == mark].all()
    assert not keep.all()
    wanted = proof.reference(model, inputs, got.tokens[0], keep, positions)
    assert torch.allclose(got.logits[0][keep], wanted[: -proof.STEPS], atol=proof.TOLERANCE)
    assert torch.allclose(got.steps[0], wanted[-proof.STEPS - 1 : -1], atol=proof.TOLERANCE)
