"""apply, remove and the handle: what a user does with them, rightly and wrongly."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import tokprune
from tokprune.errors import BudgetError, OptionError, UnsupportedModelError
from tokprune.testing import build, picture


@pytest.fixture(scope="module")
def tiny():
    return build("llava")


@pytest.fixture
def model(tiny):
    yield tiny.model
    tokprune.remove(tiny.model)


@pytest.fixture(scope="module")
def inputs(tiny):
    return tiny.inputs([["Hello ", ("image", picture(60, 40, 1)), " what is this?"]])


def ours(hook) -> bool:
    """Whether a hook is tokprune's; transformers puts some of its own on the tower when hidden states are asked for."""
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__module__", "").startswith("tokprune") or type(hook).__module__.startswith("tokprune")


def clean(model) -> bool:
    """Nothing of ours is left on any module."""
    patched = {"prepare_inputs_for_generation", "_prefill", "get_image_features", "get_video_features", "_tokprune"}
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if patched & set(module.__dict__) or any(ours(h) for h in hooks):
            return False
    return True


def test_clean_sees_what_we_put_on(model):
    with tokprune.apply(model, "hired", ratio=0.5):
        assert not clean(model)
    assert clean(model)


@torch.no_grad()
def test_one_line_and_back(model, inputs):
    before = model(**inputs).logits
    pruning = tokprune.apply(model, method="divprune", ratio=0.25)
    pruned = model(**inputs).logits
    assert pruned.shape == before.shape
    assert not torch.equal(pruned, before)
    report = pruning.report()
    assert (report.kept, report.total) == (16, 64)
    assert "16/64" in str(report)
    assert json.loads(report.to_json())["kept"] == 16
    pruning.remove()
    assert clean(model)
    assert torch.equal(model(**inputs).logits, before)
    pruning.remove()  # harmless


@torch.no_grad()
def test_context_manager_cleans_up_after_an_error(model, inputs):
    with pytest.raises(RuntimeError, match="mine"), tokprune.apply(model, "divprune", ratio=0.5):
        raise RuntimeError("mine")
    assert clean(model)


@torch.no_grad()
def test_error_inside_generate_leaves_no_trace(model, inputs):
    before = model(**inputs).logits
    hidden = model.model.language_model.layers[1]
    pruning = tokprune.apply(model, "divprune", ratio=0.5)
    handle = hidden.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(RuntimeError("broken layer")))
    with pytest.raises(RuntimeError, match="broken layer"):
        model.generate(**inputs, max_new_tokens=2)
    handle.remove()
    fine = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(fine, model.generate(**inputs, max_new_tokens=3))
    pruning.remove()
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_applying_again_replaces(model, inputs):
    first = tokprune.apply(model, "random", ratio=0.5)
    second = tokprune.apply(model, "divprune", ratio=0.25)
    assert not first.active
    assert second.active
    model(**inputs)
    assert second.report().kept == 16
    assert first.last is None
    first.remove()  # the old handle must not take the new pruning away
    model(**inputs)
    assert second.active
    tokprune.remove(model)
    assert clean(model)


def test_budget_is_absolute(model, inputs):
    with tokprune.apply(model, "divprune", budget=7) as pruning, torch.no_grad():
        model(**inputs)
        assert pruning.report().kept == 7
    with tokprune.apply(model, "divprune", budget=1000) as pruning, torch.no_grad():
        model(**inputs)
        assert pruning.report().kept == 64


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.5, 10, float("nan"), float("inf"), "0.1", True, None])
def test_bad_ratio_is_refused(model, ratio):
    with pytest.raises(BudgetError, match="ratio"):
        tokprune.apply(model, "divprune", ratio=ratio)
    assert clean(model)


def test_percent_gets_a_hint(model):
    with pytest.raises(BudgetError, match=r"ratio=0\.1"):
        tokprune.apply(model, "divprune", ratio=10)


@pytest.mark.parametrize("budget", [0, -3, 2.5, "64", True])
def test_bad_budget_is_refused(model, budget):
    with pytest.raises(BudgetError, match="budget"):
        tokprune.apply(model, "divprune", budget=budget)


def test_ratio_and_budget_together_are_refused(model):
    with pytest.raises(BudgetError, match="choose one"):
        tokprune.apply(model, "divprune", ratio=0.1, budget=64)


def test_unknown_method_names_the_nearest(model):
    with pytest.raises(OptionError, match="divprune"):
        tokprune.apply(model, "divprun", ratio=0.1)


def test_unknown_option_names_the_allowed(model):
    with pytest.raises(OptionError, match=r"sed.*seed"):
        tokprune.apply(model, "random", ratio=0.1, sed=1)
    with pytest.raises(OptionError, match="no option"):
        tokprune.apply(model, "divprune", ratio=0.1, layer=3)


def test_unknown_positions(model):
    with pytest.raises(OptionError, match="compact"):
        tokprune.apply(model, "divprune", ratio=0.1, positions="compakt")


def test_two_methods_of_one_stage_are_refused(model):
    with pytest.raises(OptionError, match="one per stage"):
        tokprune.apply(model, ["divprune", "random"], ratio=0.1)


def test_text_only_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="text-only"):
        tokprune.apply(LlamaForCausalLM(config), "divprune", ratio=0.1)


def test_unknown_classes_are_refused():
    class Mine(nn.Module):
        pass

    with pytest.raises(UnsupportedModelError, match="Mine"):
        tokprune.apply(Mine(), "divprune", ratio=0.1)
    with pytest.raises(UnsupportedModelError, match="from_pretrained"):
        tokprune.apply("llava-hf/llava-1.5-7b-hf", "divprune", ratio=0.1)
    with pytest.raises(UnsupportedModelError, match="class"):
        tokprune.apply(Mine, "divprune", ratio=0.1)
    with pytest.raises(UnsupportedModelError):
        tokprune.apply(None, "divprune", ratio=0.1)


def test_config_object_is_enough(model, inputs, tmp_path):
    config = tokprune.PruneConfig.build("random", ratio=0.25, seed=3)
    config.save(tmp_path / "prune.json")
    with tokprune.apply(model, tokprune.PruneConfig.load(tmp_path / "prune.json")) as pruning, torch.no_grad():
        model(**inputs)
        assert pruning.config == config
        assert pruning.report().kept == 16
    with pytest.raises(OptionError, match="already says"):
        tokprune.apply(model, config, ratio=0.5)


@torch.no_grad()
def test_copy_of_a_pruned_model_is_its_own(model, inputs):
    pruning = tokprune.apply(model, "divprune", ratio=0.25)
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    pruning.remove()
    assert torch.equal(other(**inputs).logits, expected)
    tokprune.remove(other)
    assert clean(other)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_report_before_the_first_picture(model):
    with tokprune.apply(model, "divprune", ratio=0.1) as pruning:
        assert "no picture" in str(pruning.report())
        assert "divprune" in repr(pruning)
    assert "removed" in repr(pruning)


@torch.no_grad()
def test_wrong_number_of_placeholders_is_explained(model, inputs):
    cut = {**inputs, "input_ids": inputs["input_ids"][:, :-30], "attention_mask": inputs["attention_mask"][:, :-30]}
    ids = cut["input_ids"].clone()
    ids[0, (ids[0] == model.config.image_token_id).nonzero()[0]] = 5
    with tokprune.apply(model, "divprune", ratio=0.5), pytest.raises(tokprune.TokpruneError, match="placeholder"):
        model(**{**cut, "input_ids": ids})


@torch.no_grad()
def test_encoder_stage_by_the_same_line(model, inputs):
    before = model(**inputs).logits
    with tokprune.apply(model, "tome", ratio=0.5) as pruning:
        assert not torch.equal(model(**inputs).logits, before)
        assert "tome" in str(pruning.report())
        tokprune.apply(model, "divprune", ratio=0.5)  # replaces it
        assert not pruning.active
    tokprune.remove(model)
    assert clean(model)
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_plain_vision_transformer():
    timm = pytest.importorskip("timm", reason="tokprune[vision]")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    pixels = torch.randn(2, 3, 64, 64)
    before = vit(pixels)
    with tokprune.apply(vit, "tome", r=2):
        assert not torch.equal(vit(pixels), before)
    assert torch.equal(vit(pixels), before)
    with pytest.raises(UnsupportedModelError, match="VLM"):
        tokprune.apply(vit, "divprune", ratio=0.5)


def test_a_processor_that_is_none_is_refused_at_once() -> None:
    tiny = build("llava")
    with pytest.raises(OptionError, match="processor= takes the model's processor"):
        tokprune.apply(tiny.model, "mmtok", ratio=0.1, processor="bogus")


def test_a_tower_alone_is_told_what_it_takes() -> None:
    with pytest.raises(UnsupportedModelError, match="takes a method of the encoder stage"):
        tokprune.apply(build("llava").model.model.vision_tower, "divprune", ratio=0.1)


@pytest.mark.parametrize("method", ["divprune", "hired", ["quota", "divprune"]])
@pytest.mark.parametrize(("typed", "meant"), [("postions", "positions"), ("querry", "query"), ("ratios", "ratio")])
def test_a_misspelled_argument_is_not_blamed_on_the_method(method, typed, meant) -> None:
    """Whatever `apply` takes and does not know is looked for among its own arguments first."""
    from tokprune.config import PruneConfig

    with pytest.raises(OptionError, match=f"unknown argument '{typed}'. Did you mean '{meant}'"):
        PruneConfig.build(method, ratio=0.1, **{typed: "keep"})


def test_the_arguments_of_apply_are_the_ones_that_are_looked_among() -> None:
    import inspect

    from tokprune.config import ARGUMENTS

    named = inspect.signature(tokprune.apply).parameters.values()
    assert set(ARGUMENTS) == {p.name for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_reports_name_what_a_wrapper_wraps() -> None:
    inner = tokprune.get_method("merge", method=tokprune.get_method("hired"))
    assert tokprune.get_method("per_tile", method=inner).label == "per_tile(merge(hired))"
    assert tokprune.get_method("divprune").label == "divprune"
