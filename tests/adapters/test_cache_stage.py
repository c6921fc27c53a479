"""The cache stage in models: every decode step equals masking by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.cache_reference import answer, eager, last_layer, masked_steps
from tests.adapters.reference import HYBRID, VIDEO, language_model, samples, shared, slow_unless
from tests.spelling import cache_in
from tokprune.methods.cache.dycoke_cache import DyCokeCache
from tokprune.runtime.attention_row import attention_row, newest_query
from tokprune.runtime.cache_keys import narrow_mask
from tokprune.testing import FAMILIES, build, picture

QUICK = ("llava", "qwen2_5_vl", "qwen3_5", "gemma3", "aya_vision")
SHARE, NEW = 0.3, 6


def compare(family: str, parts: list[Any], method: DyCokeCache, ratio: float | None, positions: str = "auto") -> None:
    """A left-padded batch with the cache stage against each prompt alone with masks."""
    tiny = shared(family)
    inputs = tiny.inputs(parts)
    stages = method if ratio is None else ["random", method]
    with tokprune.apply(tiny.model, stages, ratio=SHARE if ratio is None else ratio, positions=positions) as pruning:
        tokens, logits = answer(tiny, inputs, NEW)
    assert pruning.cache.steps == NEW - 1
    sets = []
    for row in range(len(parts)):
        one = tiny.inputs(parts[row : row + 1])
        full = method.compat == "published"
        wanted, reference = masked_steps(
            family, one, tokens[row, :-1], method.layer, SHARE, ratio, method.similarity, full, positions
        )
        sets += reference.sets
        assert float((wanted - logits[row, 1:]).abs().max()) < (1e-3 if family in HYBRID else 1e-4)
    visual = len(reference.visual)
    assert min(len(s) for s in sets) < visual, "nothing was left out"


@pytest.mark.parametrize(
    ("family", "ratio"),
    [slow_unless(f in QUICK and (r is not None or f == "llava"), f, r) for f in FAMILIES for r in (None, 0.5)],
)
def test_steps_equal_those_with_masked_keys(family: str, ratio: float | None) -> None:
    layer = last_layer(shared(family))
    method = DyCokeCache(layer=layer, pruning_rate=1 - SHARE)
    for changed in ({}, {"similarity": 1.0}, {"compat": "published"}):
        compare(family, samples("image"), DyCokeCache(**{**vars(method), **changed}), ratio)


@pytest.mark.parametrize("kind", ["video", "mixed"])
@pytest.mark.parametrize("family", [slow_unless(f in ("internvl", "qwen2_vl"), f) for f in VIDEO])
def test_clips(family: str, kind: str) -> None:
    if kind == "mixed" and family in ("perception_lm", "glm4v", "minicpmv4_6", "molmo2"):
        pytest.skip("does not mix clips and images")
    method = DyCokeCache(layer=last_layer(shared(family)), pruning_rate=1 - SHARE)
    compare(family, samples(kind), method, 0.5)


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_positions(positions: str) -> None:
    compare("qwen2_5_vl", samples("image"), DyCokeCache(layer=1, pruning_rate=1 - SHARE), 0.5, positions)


@pytest.mark.parametrize("layer", [1, 2])
def test_sliding_layers_forget_the_first_keys(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 with a window shorter than the prompt: layers below and above have lost some visual keys."""
    tiny = shared("gemma3")
    inputs = tiny.inputs([["A ", ("image", picture(60, 40, 1)), " what is this, please?"]])
    window = inputs["input_ids"].shape[1] - 10
    for model in (tiny.model, eager("gemma3").model):
        monkeypatch.setattr(language_model(model).config, "sliding_window", window)
    with tokprune.apply(tiny.model, DyCokeCache(layer=layer, similarity=1.0), ratio=SHARE):
        tokens, logits = answer(tiny, inputs, NEW)
    wanted, reference = masked_steps("gemma3", inputs, tokens[0, :-1], layer, SHARE, similarity=1.0)
    assert reference.lost > 0, "no layer has lost a visual key"
    assert float((wanted - logits[0, 1:]).abs().max()) < 1e-4


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_row_equals_the_eager_attention_map(family: str) -> None:
    """Every attention layer of every family, in a decode step of a left-padded batch."""
    tiny = eager(family)
    inputs = tiny.inputs(samples("image"))
    seen: list[float] = []

    def check(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            return
        n = output[1].shape[-1]
        keys = cache_in(kwargs).layers[module.layer_idx].keys[:, :, -n:]
        if keys.shape[2] == n:  # a full sliding window has let go of its first key already
            query = newest_query(module, hidden, kwargs["position_embeddings"])
            row = attention_row(query, keys, module.scaling, kwargs["attention_mask"])
            seen.append(float((row - output[1].mean(1)[:, 0]).abs().max()))

    layers = [layer.self_attn for layer in language_model(tiny.model).layers if hasattr(layer, "self_attn")]
    handles = [a.register_forward_hook(check, with_kwargs=True) for a in layers]
    try:
        tiny.model.generate(**inputs, max_new_tokens=3)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2 * len(layers) or family in ("gemma3", "aya_vision", "cohere2_vision")
    assert seen
    assert max(seen) < 1e-5


def test_softcapped_and_masked_row() -> None:
    query, keys = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    logits = torch.tanh((query @ keys.repeat_interleave(2, 1).transpose(-1, -2)) * 0.5 / 3) * 3
    wanted = logits.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1).mean(1)[:, 0]
    additive = torch.zeros(2, 1, 1, 5).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    for given_mask in (mask, mask[:, None, None].bool(), additive):
        torch.testing.assert_close(attention_row(query, keys, 0.5, given_mask, softcap=3.0), wanted)


# -- masks of kernels that are not at hand -----------------------------------------------------------------------------


def test_masks_are_cut_as_each_kernel_takes_them() -> None:
    index = torch.tensor([[4, 0, 2], [1, 3, -1]])
    two = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert narrow_mask(two, index, True, "flash_attention_2", torch.float32).tolist() == [[1, 0, 1], [1, 1, 0]]
    four = two.bool()[:, None, None]
    cut = narrow_mask(four, index, True, "sdpa", torch.float32)
    assert cut.shape == (2, 1, 1, 3)
    assert cut[:, 0, 0].tolist() == [[True, False, True], [True, True, False]]
    least = torch.finfo(torch.float16).min
    additive = torch.zeros(2, 1, 1, 5, dtype=torch.float16).masked_fill(~four, least)
    cut = narrow_mask(additive, index, True, "eager", torch.float16)
    assert cut[:, 0, 0].tolist() == [[0, least, 0], [0, 0, least]]
    assert narrow_mask(None, index, False, "sdpa", torch.float32) is None
    assert narrow_mask(None, index, True, "flash_attention_2", torch.float32).tolist() == (index >= 0).tolist()
    assert narrow_mask(None, index, True, "eager", torch.float32)[:, 0, 0].tolist()[1] == [
        0,
        0,
        torch.finfo(torch.float32).min,
    ]


def test_flash_like_kernel_gets_two_dimensional_masks() -> None:
    """A kernel that takes what flash attention takes (keys' 2-D mask, no causal mask for one query) answers as SDPA
    does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        if query.shape[2] > 1:
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            logits = logits.masked_fill(~causal, -1e9)
        if mask is not None:
            assert mask.ndim == 2
            assert mask.shape[1] == key.shape[2]
            logits = logits.masked_fill(~mask.bool()[:, None, None], -1e9)
        return (logits.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register("flash_like_cache_test", kernel)
    AttentionMaskInterface.register("flash_like_cache_test", flash_attention_mask)
    tiny, parts = build("llava"), samples("image")
    inputs = tiny.inputs(parts)
    stages = ["random", DyCokeCache(layer=1, similarity=1.0)]
    with tokprune.apply(tiny.model, stages, ratio=0.5, positions="compact"):
        tokens, wanted = answer(tiny, inputs, NEW)
    tiny.model.base_model.language_model.config._attn_implementation = "flash_like_cache_test"
    with tokprune.apply(tiny.model, stages, ratio=0.5, positions="compact"):
        got, logits = answer(tiny, inputs, NEW)
    assert torch.equal(got, tokens)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    tiny = build("llava", dtype=dtype)
    inputs = tiny.inputs(samples("image"))
    with tokprune.apply(tiny.model, DyCokeCache(layer=1), ratio=SHARE):
        tokens, logits = answer(tiny, inputs, NEW)
    assert logits.isfinite().all()
    assert tokens.shape == (2, NEW)
