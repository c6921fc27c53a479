"""The decoder stage on models that others have wrapped: accelerate's hooks, which take the place of forwards, and
torch.compile.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import slow_unless
from tests.decoder.reference import LAYERS, prompts
from tests.spelling import cache_in, with_cache
from tokprune.errors import TranslationError
from tokprune.registry import get_method
from tokprune.testing import TinyVLM, build

TOLERANCE = 1e-5
METHODS: dict[str, dict[str, Any]] = {
    "pyramiddrop": {"layers": (2, 3, 4), "shares": (0.5, 0.25, 0.1)},
    "mustdrop": {"schedule": ((2, 0.5), (4, 0.2))},
    "fastkv": {},
}


def deep(family: str) -> TinyVLM:
    """A model of the test's own: what is put around it stays."""
    return build(family, layers=LAYERS)


def answers(tiny: TinyVLM, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the prompt and what generate() writes."""
    with torch.no_grad():
        return tiny.model(**inputs).logits, tiny.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("first", ["prune", "offload"])
@pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in ("llava", "qwen2_5_vl", "gemma3")])
def test_accelerate_before_and_behind(family: str, first: str, name: str) -> None:
    if family == "gemma3" and name == "fastkv":
        pytest.skip("refused: sliding windows")
    accelerate = pytest.importorskip("accelerate")
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:2])
    plain = answers(tiny, inputs)
    pruning = tokprune.apply(tiny.model, name, **METHODS[name])
    wanted = answers(tiny, inputs)
    assert not torch.equal(wanted[0], plain[0])
    if first == "offload":
        pruning.remove()
    accelerate.cpu_offload(tiny.model, execution_device=torch.device("cpu"))
    if first == "offload":
        pruning = tokprune.apply(tiny.model, name, **METHODS[name])
    got = answers(tiny, inputs)
    assert torch.equal(got[1], wanted[1])
    assert torch.allclose(got[0], wanted[0], atol=TOLERANCE)
    pruning.remove()
    again = answers(tiny, inputs)
    assert torch.equal(again[0], plain[0])
    assert torch.equal(again[1], plain[1])


def test_wrapped_layers_are_given_back_in_any_order() -> None:
    """What accelerate put around a stand-in passes calls on once the pruning is gone, and comes off as ever."""
    hooks = pytest.importorskip("accelerate.hooks")
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:2])
    plain = answers(tiny, inputs)
    layers = tiny.model.model.language_model.layers
    pruning = tokprune.apply(tiny.model, "fastv", layer=2)
    wanted = answers(tiny, inputs)
    for layer in layers:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    assert torch.equal(answers(tiny, inputs)[0], wanted[0])
    pruning.remove()
    assert torch.equal(answers(tiny, inputs)[0], plain[0])
    for layer in layers:
        hooks.remove_hook_from_module(layer)
    assert torch.equal(answers(tiny, inputs)[0], plain[0])
    with tokprune.apply(tiny.model, "fastv", layer=2):
        assert torch.equal(answers(tiny, inputs)[0], wanted[0])


def test_a_copy_of_a_layer_alone_runs_plain() -> None:
    """A copied layer belongs to no pruned model; its stand-in passes everything by, and so does a removed one."""
    tiny = deep("llava")
    layer = tiny.model.model.language_model.layers[2]
    hidden = torch.randn(1, 4, tiny.model.config.text_config.hidden_size)
    rotary = tiny.model.model.language_model.rotary_emb(hidden, torch.arange(4)[None])
    wanted = layer(hidden, position_embeddings=rotary)
    with tokprune.apply(tiny.model, "fastv", layer=2):
        single = copy.deepcopy(layer)
        assert torch.equal(single(hidden, position_embeddings=rotary), wanted)
    assert torch.equal(single(hidden, position_embeddings=rotary), wanted)
    assert torch.equal(layer(hidden, position_embeddings=rotary), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "name"), [("model", "pyramiddrop"), ("layers", "fastkv")])
@torch.no_grad()
def test_compiled(what: str, name: str) -> None:
    """Compiled before a pruning comes, used plain, pruned, and plain again: never the answer of another state."""
    pytest.importorskip("torch._dynamo")
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:2])
    plain = answers(tiny, inputs)
    with tokprune.apply(tiny.model, name, **METHODS[name]):
        wanted = answers(tiny, inputs)
    torch._dynamo.reset()
    parts = [tiny.model] if what == "model" else list(tiny.model.model.language_model.layers)
    for part in parts:
        part.compile(backend="eager")
    first = answers(tiny, inputs)
    assert torch.allclose(first[0], plain[0], atol=TOLERANCE)
    with tokprune.apply(tiny.model, name, **METHODS[name]):
        got = answers(tiny, inputs)
    assert torch.allclose(got[0], wanted[0], atol=TOLERANCE)
    assert torch.equal(got[1], wanted[1])
    again = answers(tiny, inputs)
    assert torch.allclose(again[0], plain[0], atol=TOLERANCE)
    torch._dynamo.reset()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["fastv", ["divprune", "fastv"]])
@torch.no_grad()
def test_a_prompt_that_never_reached_the_language_model_drops_nothing_elsewhere(error: Any, method: Any) -> None:
    """Stopped in front of the language model, which is then called by itself. Behind an interrupt, of which torch tells
    no hook, its first call may be refused.
    """
    tiny = deep("llava")
    inputs, text = tiny.inputs(prompts("llava")[:1]), tiny.model.model.language_model
    words = {"inputs_embeds": tiny.model.get_input_embeddings()(torch.arange(5)[None])}
    plain = text(**words).last_hidden_state

    def stop(*_: Any) -> None:
        raise error

    with tokprune.apply(tiny.model, method, ratio=0.5):
        wanted = answers(tiny, inputs)
        hook = text.register_forward_pre_hook(stop, prepend=True)
        with pytest.raises(error):
            tiny.model(**inputs)
        hook.remove()
        if error is KeyboardInterrupt:
            with pytest.raises(TranslationError, match="was given 5 tokens"):
                text(**words)
        out = text(**words, use_cache=True)
        assert torch.equal(out.last_hidden_state, plain)
        text(**words, **with_cache(cache_in(out)))
        assert torch.equal(answers(tiny, inputs)[1], wanted[1])


PAIRS: dict[str, dict[str, Any]] = {
    "connector": {"method": "divprune", "ratio": 0.5},
    "drops": {"method": get_method("pyramiddrop", schedule=((2, 0.5), (4, 0.2)))},
    "frees": {"method": "kvmerger"},
    "reads": {"method": ["random", get_method("dycoke_cache", layer=3)], "ratio": 0.5},
}


@pytest.mark.parametrize(
    ("first", "second"),
    [slow_unless("drops" in (a, b) and a != b and "connector" not in (a, b), a, b) for a in PAIRS for b in PAIRS],
)
def test_models_that_share_a_language_model_do_not_meet(first: str, second: str) -> None:
    """Each answers as if the other were not pruned, and plain when its own pruning is gone, the first one first."""
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava"))
    plain = answers(tiny, inputs)
    twin = deep("llava")
    twin.model.model.language_model = tiny.model.model.language_model
    with tokprune.apply(tiny.model, **PAIRS[first]):
        wanted = answers(tiny, inputs)
    one, two = tokprune.apply(tiny.model, **PAIRS[first]), tokprune.apply(twin.model, **PAIRS[second])
    assert torch.equal(answers(tiny, inputs)[1], wanted[1])
    others = answers(twin, inputs)
    one.remove()
    assert torch.equal(answers(twin, inputs)[1], others[1])
    assert torch.equal(answers(tiny, inputs)[1], plain[1])
    two.remove()
    assert torch.equal(answers(twin, inputs)[1], plain[1])
