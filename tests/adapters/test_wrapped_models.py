"""Pruned models that are copied, wrapped by PEFT, offloaded, spread over devices, or put into a pipeline."""

from __future__ import annotations

import copy

import pytest
import torch

import tokprune
from tests.adapters.reference import (
    QUICK,
    apart,
    prompt,
    prompt_of,
    run,
    samples,
)
from tests.adapters.shortened import RATIO, TOLERANCE
from tests.adapters.test_training import gradients
from tokprune.testing import TinyVLM, build

# -- copies and wrappers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", QUICK)
def test_copy_of_a_pruned_model_is_pruned_by_itself(family: str) -> None:
    tiny = build(family)
    case = prompt_of(tiny, samples("image"))
    for method in ("random", "hired"):
        pruning = tokprune.apply(tiny.model, method, ratio=RATIO)
        pruned = run(tiny, case.inputs)
        twin = TinyVLM(family, copy.deepcopy(tiny.model), tiny.processor, tiny.spec)
        assert torch.equal(run(twin, case.inputs).logits, pruned.logits)
        pruning.remove()
        assert torch.equal(run(tiny, case.inputs).logits, case.unpruned.logits)
        assert torch.equal(run(twin, case.inputs).steps, pruned.steps), "the copy must not lean on the original"
        tokprune.apply(tiny.model, method, ratio=0.6)
        assert torch.equal(run(twin, case.inputs).logits, pruned.logits)
        tokprune.remove(tiny.model)
        tokprune.remove(twin.model)
        assert torch.equal(run(twin, case.inputs).logits, case.unpruned.logits)


@pytest.mark.parametrize("first", ["prune", "wrap"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_peft_wrapped(family: str, first: str) -> None:
    peft = pytest.importorskip("peft")
    tiny = build(family)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    torch.manual_seed(0)
    pruning = tokprune.apply(tiny.model, "random", ratio=RATIO, positions="keep") if first == "prune" else None
    wrapped = peft.get_peft_model(tiny.model, config).eval()
    if pruning is None:
        pruning = tokprune.apply(wrapped, "random", ratio=RATIO, positions="keep")
    outer = TinyVLM(family, wrapped, tiny.processor, tiny.spec)
    inputs = tiny.inputs(samples("image"))
    got = run(outer, inputs)
    wrapped.train()
    loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
    grads = gradients(wrapped, loss)
    wrapped.eval()
    assert grads
    assert all("lora" in name for name in grads)
    merged = wrapped.merge_and_unload()
    assert merged is tiny.model
    after = run(tiny, inputs)
    assert apart([after.steps], [got.steps]) < TOLERANCE
    pruning.remove()
    case = prompt_of(tiny, samples("image"))
    assert case.distance(pruning.last.keep, "keep", after) < TOLERANCE


@pytest.mark.parametrize("method", ["divprune", "hired"])
@pytest.mark.parametrize("first", ["prune", "offload"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_accelerate_offload(family: str, first: str, method: str) -> None:
    """Weights on the meta device between uses, as device_map with offloading leaves them."""
    accelerate = pytest.importorskip("accelerate")
    tiny = build(family)
    inputs = tiny.inputs(samples("image"))
    unpruned = run(tiny, inputs)
    pruning = tokprune.apply(tiny.model, method, ratio=RATIO)
    wanted, keep = run(tiny, inputs), pruning.last.keep
    if first == "offload":
        pruning.remove()
    accelerate.cpu_offload(tiny.model, execution_device=torch.device("cpu"))
    assert next(tiny.model.parameters()).device.type == "meta"
    if first == "offload":
        pruning = tokprune.apply(tiny.model, method, ratio=RATIO)
    got = run(tiny, inputs)
    assert torch.equal(pruning.last.keep, keep), "what was seen of the encoder got lost on the way"
    assert torch.equal(got.tokens, wanted.tokens)
    assert apart([got.logits], [wanted.logits]) < TOLERANCE
    pruning.remove()
    assert torch.equal(run(tiny, inputs).logits, unpruned.logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_device_map(family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    tiny = build(family)
    inputs = tiny.inputs(samples("image"))
    with tokprune.apply(tiny.model, "hired", ratio=RATIO):
        wanted = run(tiny, inputs)
    accelerate.dispatch_model(tiny.model, {"": "cpu"}, force_hooks=True)
    with tokprune.apply(tiny.model, "hired", ratio=RATIO):
        got = run(tiny, inputs)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.tokens, wanted.tokens)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_pipeline(family: str) -> None:
    from transformers import pipeline

    tiny = prompt(family).tiny
    parts = samples("image")[0]
    pipe = pipeline("image-text-to-text", model=tiny.model, processor=tiny.processor)
    inputs = tiny.chat([parts])

    def answer() -> str:
        out = pipe(text=tiny.messages(parts), max_new_tokens=5, return_full_text=False)
        return out[0]["generated_text"]

    before = answer()
    with tokprune.apply(tiny.model, "random", ratio=RATIO) as pruning:
        got = answer()
        assert sum(r.kept for r in pruning.last.streams) < sum(r.total for r in pruning.last.streams)
        new = tiny.model.generate(**inputs, max_new_tokens=5)[:, inputs["input_ids"].shape[1] :]
    assert got == tiny.processor.tokenizer.decode(new[0], skip_special_tokens=True)
    assert got != before
    assert answer() == before
