"""Bytes of caches: what tensors hold equals what arithmetic says."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.spelling import cache_in
from tokprune.profiling import memory
from tokprune.testing import build, picture


def test_cache_of_a_llama_equals_arithmetic() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        cache = cache_in(model(torch.randint(0, 32, (2, 21))))
    by_hand = 2 * 3 * 2 * 21 * 2 * 16 * 4  # K and V, layers, batch, tokens, heads, head size, bytes
    assert memory.kv_cache_bytes(cache) == by_hand
    assert memory.kv_cache_bytes_of(config, 21, 2, torch.float32) == by_hand
    assert memory.kv_cache_bytes_of(config, 1, dtype=torch.float32) * 42 == by_hand
    old = tuple((layer.keys, layer.values) for layer in cache.layers)
    assert memory.kv_cache_bytes(old) == by_hand
    assert memory.kv_cache_bytes(None) == 0


def test_sliding_layers_keep_their_window() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        cache = cache_in(model(torch.randint(0, 32, (1, 30)), use_cache=True))
    assert memory.kv_cache_bytes(cache) == memory.kv_cache_bytes_of(config, 30, 1, torch.float32)
    assert memory.kv_cache_bytes_of(config, 30, 1, torch.float32) == 2 * (2 * 7 + 2 * 30) * 16 * 4


def test_a_vlm_caches_prompt_and_all_new_tokens_but_the_last() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["What is ", ("image", picture(40, 40)), "?"]])
    with torch.no_grad():
        out = tiny.model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
    tokens = inputs["input_ids"].shape[1] + 3
    assert memory.kv_cache_bytes(cache_in(out)) == memory.kv_cache_bytes_of(tiny.model.config, tokens, 1, torch.float32)


def test_weights_count_shared_tensors_once() -> None:
    tied = torch.nn.Linear(4, 3, bias=False)
    model = torch.nn.ModuleList([tied, torch.nn.Linear(4, 3, bias=False)])
    model[1].weight = tied.weight
    assert memory.weight_bytes(model) == 48
    with torch.device("meta"):
        assert memory.weight_bytes(torch.nn.Linear(10, 10, dtype=torch.bfloat16)) == 220


@pytest.mark.parametrize(
    ("n", "text"), [(512, "512 B"), (3 * 2**20, "3 MiB"), (14.6 * 2**30, "14.6 GiB"), (2**41, "2048 GiB")]
)
def test_readable(n: float, text: str) -> None:
    assert memory.readable(n) == text
