"""The conventions of transformers that pruning rests on: this release keeps them, and a release that breaks one is
refused."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, GenerationMixin, masking_utils

import tokprune
from tests.adapters.reference import prompt, shared
from tests.spelling import NAME, cache_in, with_cache
from tokprune.adapters import dialect
from tokprune.adapters.base import get_adapter
from tokprune.errors import UnsupportedModelError
from tokprune.runtime import contract
from tokprune.testing import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_this_transformers_keeps_every_convention(family: str) -> None:
    """The canary: a failure here names what changed in transformers."""
    functions = contract.Functions.of(get_adapter(shared(family).model))
    changed = [sentence for sentence, holds in contract.CONVENTIONS if not holds(functions)]
    assert not changed, f"transformers {transformers.__version__} no longer keeps: {changed}"


def renamed(function: Any, **names: str) -> Any:
    """A function of the same kind whose parameters have other names."""
    import inspect

    signature = inspect.signature(function)
    parameters = [p.replace(name=names.get(p.name, p.name)) for p in signature.parameters.values()]

    def other(*args: Any, **kwargs: Any) -> Any:
        back = {new: old for old, new in names.items()}
        return function(*args, **{back.get(k, k): v for k, v in kwargs.items()})

    other.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return other


def logical_masks(*args: Any, **kwargs: Any) -> torch.Tensor:
    """A mask builder that asks the cache how long the conversation is, not how many keys it holds."""
    return torch.zeros(1, 1, 1, int(cache_in(kwargs).get_seq_length()) + 1)


def breaks() -> dict[str, tuple[Any, str, Any, str]]:
    """Owner, attribute, what a later release could make of it (None: gone), and words of the refusal."""
    model = shared("llava").model
    multimodal, base, text = type(model), type(model.base_model), type(model.base_model.language_model)
    prepare = GenerationMixin.prepare_inputs_for_generation
    three = shared("qwen2_5_vl").model.base_model
    return {
        "cache": (
            base,
            "forward",
            renamed(base.forward, **{NAME: "kv"}),
            "multimodal model's forward names its KV cache",
        ),
        "text cache": (text, "forward", renamed(text.forward, **{NAME: "kv"}), "language model's forward names its KV"),
        "mask": (text, "forward", renamed(text.forward, attention_mask="mask"), "attention_mask and position_ids"),
        "keywords": (multimodal, "forward", lambda self, mm_encoder_outputs=None: None, "passes keywords on"),
        "prepare": (
            *(GenerationMixin, "prepare_inputs_for_generation"),
            *(renamed(prepare, is_first_iteration="first"), "is_first_iteration"),
        ),
        "prefill": (GenerationMixin, "_prefill", None, "_prefill"),
        "prefill arguments": (
            *(GenerationMixin, "_prefill"),
            *(renamed(GenerationMixin._prefill, model_kwargs="inputs"), "_prefill"),
        ),
        "positions": (
            *(type(three), "compute_3d_position_ids"),
            *(renamed(type(three).compute_3d_position_ids, **{NAME: "kv"}), "compute_3d_position_ids"),
        ),
        "cache method": (Cache, "get_query_offset", None, "Cache has"),
        "mask builder": (masking_utils, "create_causal_mask", None, "masks are built"),
        "mask lengths": (masking_utils, "create_causal_mask", logical_masks, "masks are built"),
        "window lengths": (masking_utils, "create_sliding_window_causal_mask", logical_masks, "masks are built"),
    }


@pytest.mark.parametrize("change", sorted(breaks()))
def test_a_release_that_breaks_a_convention_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """apply() names the convention, what works, and what to install; the model stays as it was, also when it was
    pruned."""
    owner, name, new, words = breaks()[change]
    model = shared("qwen2_5_vl" if change == "positions" else "llava").model
    with tokprune.apply(model, "random", ratio=0.5) as before:
        if new is None:
            monkeypatch.delattr(owner, name)
        else:
            monkeypatch.setattr(owner, name, new)
        with pytest.raises(UnsupportedModelError) as refusal:
            tokprune.apply(model, "divprune", ratio=0.5)
        monkeypatch.undo()
        assert before.active
    message = str(refusal.value)
    assert words in message
    assert "transformers 5.23 and 5.24" in message
    assert transformers.__version__ in message
    assert f"pip install 'transformers>={dialect.TESTED[0]}" in message
    tokprune.apply(model, "divprune", ratio=0.5).remove()  # the next apply() looks again


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods run beside it (vLLM wants one), and so the package installs; apply() says what to do."""
    model = shared("llava").model
    before = set(vars(model))
    monkeypatch.setattr("transformers.__version__", "5.22.3")
    with pytest.raises(UnsupportedModelError, match=r"5\.22\.3.*pip install 'transformers>=5\.23"):
        tokprune.apply(model, "divprune", ratio=0.5)
    assert set(vars(model)) == before
    monkeypatch.setattr("transformers.__version__", "5.23.0")
    tokprune.apply(model, "divprune", ratio=0.5).remove()


def test_flash_attention_needs_a_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = get_adapter(shared("llava").model)
    config = adapter.config.get_text_config()
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    contract.check_contract(adapter)
    rotary = next(type(m) for m in adapter.text_model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    monkeypatch.setattr(rotary, "forward", lambda self, x, places: x)
    with pytest.raises(UnsupportedModelError, match="RotaryEmbedding"):
        contract.check_contract(adapter)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_no_outdated_name_is_used(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a warning nor a log line of transformers says that pruning used a name of the past."""
    from transformers import DynamicCache
    from transformers.utils import logging as log

    case = prompt(family, "image")
    model = case.tiny.model
    log.warning_once.cache_clear()
    log.get_logger("transformers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            with tokprune.apply(model, "random", ratio=0.3):
                for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 16}, {"num_beams": 2}):
                    model.generate(**case.inputs, max_new_tokens=3, **options)
                out = model(**case.inputs, use_cache=True)
                mask = torch.cat([case.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
                model(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, **with_cache(cache_in(out)))
            with tokprune.apply(model, "dycoke_cache", layer=1):
                model.generate(**case.inputs, max_new_tokens=3, **with_cache(DynamicCache()))
    finally:
        log.get_logger("transformers").removeHandler(caplog.handler)
    said = [str(w.message) for w in caught] + [r.getMessage() for r in caplog.records]
    assert not [s for s in said if any(name in s for name in dialect.CACHE) and "deprecated" in s]


@torch.no_grad()
def test_a_cache_by_its_old_name_is_the_cache() -> None:
    """A caller may still write past_key_values where transformers takes both."""
    if NAME == "past_key_values":
        pytest.skip("this transformers has one name")
    case = prompt("llava", "image")
    model = case.tiny.model
    token = torch.tensor([[5], [6]])
    mask = torch.cat([case.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with tokprune.apply(model, "random", ratio=0.3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = []
        for name in (NAME, "past_key_values"):
            out = model.base_model(**case.inputs, use_cache=True)
            call = {"input_ids": token, "attention_mask": mask, name: cache_in(out)}
            logits.append(model.base_model(**call).last_hidden_state)
        assert torch.equal(*logits)
