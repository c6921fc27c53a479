"""Decoder methods under everything that generate() and a training loop do, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import slow_unless
from tests.decoder.reference import deep, gone_by_layer, prompts
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.registry import get_method
from tokprune.testing import TinyVLM, build

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "llava_next")
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 3, "ratio": 0.25},
    "pyramiddrop": {"layers": (3, 4), "shares": (0.5, 0.2)},
}
every = pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in FAMILIES])
both = pytest.mark.parametrize("name", METHODS)


def answer(tiny: TinyVLM, inputs: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """New tokens (B, T) and their logits (B, T, V)."""
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, **more}
    out = tiny.model.generate(**inputs, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@both
@every
def test_rows_do_not_depend_on_each_other_nor_on_the_cache(family: str, name: str) -> None:
    """Batch against each prompt alone, other orders, either padding side, and without a cache."""
    tiny = deep(family)
    parts = prompts(family)
    inputs = tiny.inputs(parts)
    with tokprune.apply(tiny.model, name, **METHODS[name]) as pruning:
        _, batch = answer(tiny, inputs)
        drops = [d.kept for d in pruning.last.drops]
        for row in range(3):
            _, alone = answer(tiny, tiny.inputs(parts[row : row + 1]))
            torch.testing.assert_close(alone[0], batch[row], atol=2e-5, rtol=0)
            if row < 2:  # the last is of words alone
                assert [d.kept[0] for d in pruning.last.drops] == [kept[row] for kept in drops]
        _, turned = answer(tiny, tiny.inputs(parts[::-1]))
        torch.testing.assert_close(turned.flip(0), batch, atol=2e-5, rtol=0)
        _, uncached = answer(tiny, inputs, use_cache=False)
        torch.testing.assert_close(uncached, batch, atol=2e-5, rtol=0)


@every
@torch.no_grad()
def test_padding_on_the_right_is_padding_on_the_left(family: str) -> None:
    tiny = deep(family)
    left, right = (tiny.inputs(prompts(family), side) for side in ("left", "right"))
    call = {"position_ids": (left["attention_mask"].cumsum(1) - 1).clamp(min=0)} if "mm" not in str(left.keys()) else {}
    with tokprune.apply(tiny.model, "fastv", **METHODS["fastv"]):
        a = tiny.model(**left, **call).logits[left["attention_mask"].bool()]
        b = tiny.model(**right).logits[right["attention_mask"].bool()]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@both
@every
def test_beams_and_samples(family: str, name: str) -> None:
    """Beams of a batch are those of each prompt alone; several return sequences are each the one."""
    tiny = deep(family)
    parts = prompts(family)
    with tokprune.apply(tiny.model, name, **METHODS[name]):
        out = tiny.model.generate(**tiny.inputs(parts), max_new_tokens=5, num_beams=3, num_return_sequences=2)
        for row in range(3):
            inputs = tiny.inputs(parts[row : row + 1])
            alone = tiny.model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=2)
            assert torch.equal(out[2 * row : 2 * row + 2, -5:], alone[:, -5:])
        once, _ = answer(tiny, tiny.inputs(parts))
        again, _ = answer(tiny, tiny.inputs(parts), num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(again, once.repeat_interleave(2, 0))


@both
@every
def test_gradients_flow_and_the_loss_is_that_of_masking(family: str, name: str) -> None:
    """Labels fit the widened logits; every weight of the layers gets a gradient."""
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels > 255, -100)
    with tokprune.apply(tiny.model, name, **METHODS[name]) as pruning:
        out = tiny.model(**inputs, labels=labels)
        out.loss.backward()
        gone = gone_by_layer(pruning, inputs["attention_mask"].bool())
    assert out.logits.shape[:2] == labels.shape
    logits = out.logits[:, :-1][labels[:, 1:] >= 0]
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:][labels[:, 1:] >= 0])
    torch.testing.assert_close(out.loss, wanted)
    layers = tiny.model.base_model.language_model.layers
    assert all(p.grad is not None for p in layers[-1].parameters())
    last = gone[max(gone)]
    row = int(last.any(1).nonzero()[0])
    first = int(last[row].nonzero()[0])  # a dropped column answers with the nearest before it that stays
    torch.testing.assert_close(out.logits[row, first], out.logits[row, first - 1])
    tiny.model.zero_grad(set_to_none=True)


@both
@every
def test_gradients_reach_returned_states(family: str, name: str) -> None:
    """retain_grad() works as on an unpruned model: what is dropped in front of a layer leads nowhere from there."""
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:2])
    real = inputs["attention_mask"].bool()
    with tokprune.apply(tiny.model, name, **METHODS[name]) as pruning:
        out = tiny.model(**inputs, output_hidden_states=True)
        left = [pruning.last.columns_at(layer) for layer in range(5)]
        plain = tiny.model(**inputs, output_hidden_states=False).logits
    assert torch.equal(out.logits, plain)
    for state in out.hidden_states:
        state.retain_grad()
    out.logits[:, -1].sum().backward()
    for i, state in enumerate(out.hidden_states):
        assert state.grad is not None
        into = left[min(i, 4)]  # the tokens that the next layer works on
        assert float(state.grad[~into & real].abs().sum()) == 0
        assert float(state.grad[into].abs().sum()) > 0
    wide = [h.grad.ne(0).any(-1).sum() for h in out.hidden_states[:5]]
    assert wide[3] < wide[2]
    tiny.model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_packed_rows_are_refused_and_the_model_stays_whole() -> None:
    """Positions that start anew in a row without padding, or ends of samples as flash attention takes them."""
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:1])
    ids = torch.cat([inputs["input_ids"]] * 2, 1)
    n = inputs["input_ids"].shape[1]
    pixels = torch.cat([inputs["pixel_values"]] * 2)
    positions = torch.arange(n).repeat(2)[None]
    plain = tiny.model(input_ids=ids, pixel_values=pixels, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(plain[:, :n], plain[:, n:], atol=1e-5, rtol=0)  # transformers keeps them apart
    ends = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    for more in ({"position_ids": positions}, {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}):
        with (
            tokprune.apply(tiny.model, "fastv", **METHODS["fastv"]),
            pytest.raises(UnsupportedModelError, match="packed into one row"),
        ):
            tiny.model(input_ids=ids, pixel_values=pixels, use_cache=False, **more)
    again = tiny.model(input_ids=ids, pixel_values=pixels, position_ids=positions, use_cache=False).logits
    assert torch.equal(plain, again)


@torch.no_grad()
@every
def test_hidden_states_have_the_width_of_the_prompt(family: str) -> None:
    """Each layer's, with the nearest token before it in a dropped one's place; attentions are what was computed."""
    tiny = deep(family, "eager")
    inputs = tiny.inputs(prompts(family)[:2])
    length = inputs["input_ids"].shape[1]
    plain = tiny.model(**inputs, output_hidden_states=True)
    with tokprune.apply(tiny.model, "fastv", **METHODS["fastv"]) as pruning:
        out = tiny.model(**inputs, output_hidden_states=True, output_attentions=True)
        generated = tiny.model.generate(
            **inputs, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True
        )
        left = pruning.last.columns_at(3)
    real = inputs["attention_mask"].bool()
    for i, (state, whole) in enumerate(zip(out.hidden_states, plain.hidden_states, strict=True)):
        assert state.shape == whole.shape
        if i <= 3:  # up to what enters layer 3
            torch.testing.assert_close(state[real], whole[real], atol=1e-5, rtol=1e-5)
    assert [h.shape[1] for h in generated.hidden_states[0]] == [length] * len(out.hidden_states)
    before = torch.where(left, torch.arange(length), -1).cummax(1).values
    at = (real & (before >= 0)).nonzero()
    for state in out.hidden_states[4:]:
        assert torch.equal(state[at[:, 0], at[:, 1]], state[at[:, 0], before[at[:, 0], at[:, 1]]])
    assert [a.shape[-1] for a in out.attentions] == [length] * 3 + [int(left.sum(1).max())] * 2


@both
def test_threads_do_not_meet(name: str) -> None:
    import threading

    tiny = deep("llava")
    inputs = [tiny.inputs([p]) for p in prompts("llava")]
    got: dict[int, list[Tensor]] = {}
    with tokprune.apply(tiny.model, name, **METHODS[name]):
        wanted = [answer(tiny, one)[0] for one in inputs]

        def work(i: int) -> None:
            got[i] = [answer(tiny, inputs[i % 3])[0] for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(tokens, wanted[i % 3]) for i, three in got.items() for tokens in three)
    assert len(got) == 4


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"cache_implementation": "static"}, "one fixed length for all layers"),
        ({"prefill_chunk_size": 16}, "prefill in chunks"),
        ({"prompt_lookup_num_tokens": 2}, "drafted tokens"),
    ],
)
def test_what_cannot_be_right_is_refused(call: dict[str, Any], why: str) -> None:
    """With the reason, and the next call is as if nothing had happened."""
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:1])
    with tokprune.apply(tiny.model, "fastv", **METHODS["fastv"]):
        before, _ = answer(tiny, inputs)
        with pytest.raises(UnsupportedModelError, match=why):
            answer(tiny, inputs, **call)
        again, _ = answer(tiny, inputs)
    assert torch.equal(before, again)


def test_models_and_options_that_cannot_be_right_are_refused() -> None:
    """At apply(), which leaves the model as it was."""
    tiny = build("qwen3_vl", layers=5)
    with pytest.raises(OptionError, match=r"DeepStack features .* first 2: 2 <= layer <= 4"):
        tokprune.apply(tiny.model, "fastv", layer=1, ratio=0.5)
    with pytest.raises(OptionError, match=r"front of layers \[9\]; .* has 5 layers"):
        tokprune.apply(tiny.model, "fastv", layer=9, ratio=0.5)
    with pytest.raises(OptionError, match="cannot run beside"):
        tokprune.apply(tiny.model, [get_method("fastv", layer=3), get_method("dycoke_cache", layer=3)])
    with pytest.raises(OptionError, match="leaves no visual token"):
        tokprune.apply(tiny.model, "vtw", layer=3, budget=7)
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())
    tiny = build("llava", layers=4)
    tiny.model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        tokprune.apply(tiny.model, "fastv", layer=3, ratio=0.5)


def test_gradient_checkpointing_is_refused() -> None:
    tiny = build("llava", layers=4)
    tiny.model.train()
    tiny.model.gradient_checkpointing_enable()
    with (
        tokprune.apply(tiny.model, "fastv", layer=2, ratio=0.5),
        pytest.raises(UnsupportedModelError, match="gradient checkpointing"),
    ):
        tiny.model(**tiny.inputs(prompts("llava")[:1]))


@pytest.mark.parametrize("padded", [False, True])
def test_windows_of_sliding_layers_are_those_of_the_prompt(padded: bool) -> None:
    """Gemma 3 with a window shorter than the prompt: layers that lost tokens see what masking leaves in the window."""
    from tests.decoder.reference import distance, run

    tiny = build("gemma3", layers=5)
    window, text = 40, tiny.model.base_model.language_model
    text.config.sliding_window = window
    for layer in text.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = window
    inputs = tiny.inputs(prompts("gemma3")[: 2 if padded else 1])
    for name, options in (("fastv", {"layer": 1, "ratio": 0.3}), ("vtw", {"layer": 3})):
        with tokprune.apply(tiny.model, name, **options) as pruning:
            got = run(tiny, inputs, pruning, 12)
        assert got.logits.shape[1] > window
        assert distance(tiny, inputs, got, window=window) < 2e-5
