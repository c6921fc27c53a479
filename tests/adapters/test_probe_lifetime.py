"""A probe leaves nothing behind and meets what people do to models: wrappers, compiling, offloading, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters.probed import TOLERANCE, call, compute_signals, eager_maps, hooks, required_blocks, run, signals
from tokprune.adapters.towers import tower_blocks, tower_of
from tokprune.errors import MissingSignalError
from tokprune.runtime.probe import AttentionProbe
from tokprune.runtime.signals import SignalSet
from tokprune.testing import build


def test_nothing_is_copied_and_nothing_stays_behind() -> None:
    base, kwargs = call("llava")
    tower: Any = tower_of(base)
    run(base, kwargs)
    before, names = hooks(tower), {name: set(module.__dict__) for name, module in tower.named_modules()}
    outputs: list[Tensor] = []
    layer = tower_blocks(tower)[2].self_attn.k_proj
    probe = AttentionProbe(tower, [2], [1])
    with probe:
        handle = layer.register_forward_hook(lambda m, a, out: outputs.append(out))
        run(base, kwargs)
        handle.remove()
        assert probe.projections(2).k.data_ptr() == outputs[0].data_ptr()
        assert probe.output(1).shape == (2, 65, 32)
    assert hooks(tower) == before
    assert {name: set(module.__dict__) for name, module in tower.named_modules()} == names
    with pytest.raises(MissingSignalError, match="nothing was seen of block 2"):
        probe.projections(2)
    with pytest.raises(MissingSignalError, match=r"listens to blocks \[2\]"):
        probe.projections(0)


def test_no_needs_no_hooks() -> None:
    base, kwargs = call("llava")
    before = hooks(base)
    probe = required_blocks(base, ["clip_text", "frame_scores"])
    assert hooks(base) == before
    assert compute_signals(base, "image", kwargs, None, probe, ["clip_text"]) == SignalSet()
    assert compute_signals(base, "image", kwargs, None, None, []) == SignalSet()


def test_half_precision_scores_are_computed_in_float32() -> None:
    base, kwargs = call("llava", build("llava", dtype=torch.bfloat16))
    values = signals(base, kwargs, "cls_attention", "keys:0", "encoder_features").values
    assert all(value.dtype == torch.float32 for value in values.values())
    exact, more = call("llava")
    reference = signals(exact, more, "cls_attention").values["cls_attention"]
    torch.testing.assert_close(values["cls_attention"], reference, atol=2e-3, rtol=0)


def test_checkpointing_leaves_nothing_after_its_second_pass() -> None:
    base, kwargs = call("llava", build("llava"))
    base.train()
    base.vision_tower.gradient_checkpointing_enable()
    probe = required_blocks(base, ["cls_attention"])
    output = base.get_image_features(**kwargs, return_dict=True)
    values = compute_signals(base, "image", kwargs, output, probe, ["cls_attention"]).values["cls_attention"]
    assert not values.requires_grad
    probe.clear()
    sum(f.sum() for f in output.pooler_output).backward()
    assert not probe._threads.now.outputs
    probe.remove()


def test_adapters_put_on_later_are_seen() -> None:
    peft = pytest.importorskip("peft")
    base, kwargs = call("llava", build("llava"))
    probe = required_blocks(base, ["cls_attention"])
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, base)
    output = run(base, kwargs)
    found = compute_signals(base, "image", kwargs, output, probe, ["cls_attention"]).values["cls_attention"]
    probe.remove()
    expected = eager_maps(base, kwargs)[2].mean(1)[:, 0, 1:].flatten()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert all(count == (0, 0) for name, count in hooks(base).items() if "_proj" in name)


def test_offloaded_weights_are_not_touched() -> None:
    accelerate = pytest.importorskip("accelerate")
    base, kwargs = call("qwen2_5_vl", build("qwen2_5_vl"))
    expected = signals(base, kwargs, "cls_attention", "keys:0").values
    accelerate.cpu_offload(base.visual, execution_device=torch.device("cpu"))
    assert base.visual.blocks[0].attn.qkv.weight.device.type == "meta"
    found = signals(base, kwargs, "cls_attention", "keys:0").values
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def skip_unless_plain_compiles(family: str) -> None:
    """torch 2.6 cannot compile the towers of transformers 5.23 whole, with or without a probe."""
    base, kwargs = call(family, build(family))
    base.vision_tower = torch.compile(base.vision_tower, backend="eager", fullgraph=True)
    try:
        run(base, kwargs)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this torch does not compile the plain tower: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("first", ["compile", "probe"])
def test_compiled_towers(first: str) -> None:
    base, kwargs = call("llava", build("llava"))
    expected = signals(base, kwargs, "cls_attention").values["cls_attention"]
    torch._dynamo.reset()
    skip_unless_plain_compiles("llava")
    if first == "compile":
        base.vision_tower = torch.compile(base.vision_tower, backend="eager", fullgraph=True)
        run(base, kwargs)
        probe = required_blocks(base, ["cls_attention"])
    else:
        probe = required_blocks(base, ["cls_attention"])
        base.vision_tower = torch.compile(base.vision_tower, backend="eager", fullgraph=True)
    for _ in range(2):
        probe.clear()
        output = run(base, kwargs)
        found = compute_signals(base, "image", kwargs, output, probe, ["cls_attention"]).values["cls_attention"]
        torch.testing.assert_close(found, expected)
    probe.remove()


def test_a_copied_model_has_a_probe_of_its_own() -> None:
    base, kwargs = call("llava", build("llava"))
    probe = required_blocks(base, ["cls_attention"])
    run(copy.deepcopy(base), kwargs)
    assert not probe._threads.now.outputs
    run(base, kwargs)
    assert probe._threads.now.outputs
