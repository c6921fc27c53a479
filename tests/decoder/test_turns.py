"""What a cache remembers of tokens that were dropped inside the LLM: later turns, crops, copies, other prunings."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.conversations import conversation
from tests.adapters.reference import slow_unless
from tests.decoder.reference import deep, gone_by_layer, masked_answer, prompts
from tests.spelling import cache_in, with_cache
from tokprune.errors import TokpruneError, TranslationError, UnsupportedModelError
from tokprune.testing import TinyVLM

METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 3, "ratio": 0.25},
    "pyramiddrop": {"layers": (3, 4), "shares": (0.5, 0.2)},
}
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "llava_next")
both = pytest.mark.parametrize("name", METHODS)
every = pytest.mark.parametrize("family", [slow_unless(f in ("llava", "qwen2_5_vl"), f) for f in FAMILIES])


def later_turn(
    tiny: TinyVLM, rows: list[int], carry: Callable[[Any], Any] = lambda cache: cache
) -> tuple[Tensor, Any, Tensor]:
    """generate() on a prompt, then on its answer with more words, on the cache that `carry` made of the first one.

    Returns the tokens of the whole, the inputs of the first turn, and the logits of the second (B, T, V).
    """
    inputs = tiny.inputs([prompts(tiny.family)[row] for row in rows])
    first = tiny.model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    words = tiny.processor.tokenizer(" and then? ", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([first.sequences, words.expand(len(rows), -1)], 1)
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    call = {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)}
    if "mm_token_type_ids" in inputs:
        call["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    second = tiny.model.generate(input_ids=ids, **call, **options, **with_cache(carry(cache_in(first))))
    return second.sequences, inputs, torch.stack(second.logits, 1)


@both
@every
def test_a_later_turn_of_words_equals_masking(family: str, name: str) -> None:
    """Batched, as each conversation alone, and as the masked model that is told the same tokens."""
    from tests.adapters.reference import observe

    tiny = deep(family)
    with tokprune.apply(tiny.model, name, **METHODS[name]) as pruning:
        ids, inputs, batch = later_turn(tiny, [0, 1, 2])
        gone = gone_by_layer(pruning, inputs["attention_mask"].bool())
        compact = pruning.decoder.compact
        for row in range(3):
            _, _, alone = later_turn(tiny, [row])
            torch.testing.assert_close(alone[0], batch[row], atol=2e-5, rtol=0)
    native = observe(tiny, inputs)
    for row in range(3):
        forced = ids[row, inputs["input_ids"].shape[1] : -1]
        _, steps = masked_answer(tiny, native, row, {k: g[row] for k, g in gone.items()}, forced, compact)
        torch.testing.assert_close(batch[row], steps[-4:], atol=2e-5, rtol=0)


@both
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@every
def test_a_later_turn_with_a_picture_equals_masking(family: str, rows: int, name: str) -> None:
    """Two pictures in two turns, under two prunings that drop at different layers."""
    tiny = deep(family)
    talk = conversation(tiny, rows)
    length = talk.native.ids.shape[1]
    real = talk.native.real
    options = {"positions": "keep"}
    with tokprune.apply(tiny.model, name, **METHODS[name], **options) as pruning:
        cache = talk.forward_first()
        first = gone_by_layer(pruning, real[:, : talk.start])
    with tokprune.apply(tiny.model, "fastv", schedule=((2, 0.8), (4, 0.3)), **options) as pruning:
        logits = talk.forward_second(cache).logits
        second = gone_by_layer(pruning, real[:, talk.start :])
    gone = {}
    for layer in sorted({*first, *second}):
        parts = []
        for by_layer, width in ((first, talk.start), (second, length - talk.start)):
            at = [k for k in by_layer if k <= layer]
            parts.append(by_layer[max(at)] if at else torch.zeros(rows, width, dtype=torch.bool))
        gone[layer] = torch.cat(parts, 1)
    left = real & ~gone[max(gone)]
    for row in range(rows):
        prompt, _ = masked_answer(tiny, talk.native, row, {k: g[row] for k, g in gone.items()}, real[row, :0].long())
        wanted = torch.zeros(length, prompt.shape[1])
        wanted[real[row]] = prompt
        here = left[row].clone()
        here[: talk.start] = False
        torch.testing.assert_close(logits[row][here[talk.start :]], wanted[here], atol=5e-5, rtol=0)
    assert cache.get_seq_length() == length


@both
@every
def test_copies_and_pickles_of_a_cache_answer_the_same(family: str, name: str) -> None:
    tiny = deep(family)
    with tokprune.apply(tiny.model, name, **METHODS[name]):
        _, _, logits = later_turn(tiny, [0, 1, 2])
        for carry in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
            _, _, again = later_turn(tiny, [0, 1, 2], carry)
            assert torch.equal(again, logits)


@both
@torch.no_grad()
@every
def test_interleaved_caches_reset_and_pruning_again(family: str, name: str) -> None:
    """Two conversations step by step in turn; a cache that was emptied; one that another decoder method reads on."""
    tiny = deep(family)
    ones = [tiny.inputs([p]) for p in prompts(family)[:2]]

    def step(tokens: Tensor, cache: Any, at: int) -> Tensor:
        place = {} if family.startswith("qwen") else {"position_ids": torch.tensor([[at]])}
        if family.startswith("qwen"):  # what it remembers of positions is of the last prompt
            place = {"position_ids": torch.full((3, 1, 1), at)}
        logits: Tensor = tiny.model(input_ids=tokens, **place, **with_cache(cache)).logits
        return logits[:, -1]

    with tokprune.apply(tiny.model, name, **METHODS[name]):
        alone, caches = [], []
        for one in ones:
            out = tiny.model(**one, use_cache=True)
            start = out.logits[:, -1:].argmax(-1)
            caches.append((cache_in(out), start))
            cache = copy.deepcopy(cache_in(out))
            alone.append([step(start, cache, 300), step(start, cache, 301)])
        for t in range(2):
            for (cache, start), wanted in zip(caches, alone, strict=True):
                assert torch.equal(step(start, cache, 300 + t), wanted[t])
        cache = caches[0][0]
        cache.reset()
        assert torch.equal(tiny.model(**ones[1], **with_cache(cache)).logits[:, -1:].argmax(-1), caches[1][1])
        later = copy.deepcopy(cache)
        wanted = step(caches[1][1], cache, 300)
    with pytest.raises(TokpruneError, match="has been removed since"):
        step(caches[1][1], copy.deepcopy(later), 300)
    with tokprune.apply(tiny.model, "divprune", ratio=0.5), pytest.raises(TokpruneError, match="decoder stage"):
        step(caches[1][1], copy.deepcopy(later), 300)
    with tokprune.apply(tiny.model, "vtw", layer=4):
        assert torch.equal(step(caches[1][1], later, 300), wanted)


@both
@torch.no_grad()
@every
def test_a_cropped_cache_goes_on_as_if_it_had_ended_there(family: str, name: str) -> None:
    """Back over answer and question in a padded batch; layers lose as many keys as they had there."""
    tiny = deep(family)
    parts = prompts(family)[:2]
    inputs = tiny.inputs(parts)
    length = inputs["input_ids"].shape[1]
    with tokprune.apply(tiny.model, name, **METHODS[name]):
        out = tiny.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        cache, tokens = cache_in(out), out.sequences
        held = [layer.get_seq_length() for layer in cache.layers]
        for back in (2, 3 + 4):  # three tokens of the answer are in the cache
            shorter = copy.deepcopy(cache)
            shorter.crop(-back)
            assert [layer.get_seq_length() for layer in shorter.layers] == [n - back for n in held]
            call: dict[str, Any] = {
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
            }
            if "mm_token_type_ids" in inputs:
                call["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 3))
            more = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
            again = tiny.model.generate(input_ids=tokens[:, : length + 3], **call, **more, **with_cache(shorter))
            torch.testing.assert_close(again.logits[0], out.logits[3], atol=2e-5, rtol=0)


@torch.no_grad()
@every
def test_a_crop_into_a_picture(family: str) -> None:
    """What is left of it stays as it is under kept positions, and new words see it; numbered anew it is refused."""
    from tests.adapters.reference import observe

    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:1])
    visual = observe(tiny, inputs, "forward").visual[0].nonzero()[:, 0]
    cut = int(visual[len(visual) // 2])
    length = inputs["input_ids"].shape[1]
    words = tiny.processor.tokenizer(" so?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with tokprune.apply(tiny.model, "fastv", **METHODS["fastv"]) as pruning:
        out = tiny.model(**inputs, use_cache=True)
        gone = {k: g[0] for k, g in gone_by_layer(pruning, inputs["attention_mask"].bool()).items()}
        cache = cache_in(out)
        cache.crop(cut - length)
        assert cache.get_seq_length() == cut
        native = observe(tiny, inputs, "forward")
        at = torch.arange(cut, cut + words.shape[1])[None]
        at = at if not native.mrope else at.expand(3, 1, -1)
        got = tiny.model(input_ids=words, position_ids=at, **with_cache(cache)).logits[0]
    shorter = {k: g[:, :cut] for k, g in vars(native).items() if isinstance(g, Tensor) and g.ndim == 2}
    whole = copy.copy(native)
    for name, value in shorter.items():
        setattr(whole, name, value)
    whole.embeds, whole.positions = native.embeds[:, :cut], native.positions[..., :cut].clone()
    whole.planes = [plane[:, :cut] for plane in native.planes]
    whole.positions[..., -1] = cut - 1  # the words behind the cut stand there
    if native.mrope or family == "gemma3":
        pytest.skip("the reference tells positions by the last column, and reads pictures both ways")
    _, steps = masked_answer(tiny, whole, 0, {k: g[:cut] for k, g in gone.items()}, words[0])
    torch.testing.assert_close(got, steps, atol=2e-5, rtol=0)
    with tokprune.apply(tiny.model, "pyramiddrop", **METHODS["pyramiddrop"]):
        cache = cache_in(tiny.model(**inputs, use_cache=True))
        with pytest.raises(UnsupportedModelError, match="numbered anew"):
            cache.crop(cut - length)
        assert cache.get_seq_length() == length


@torch.no_grad()
def test_a_layer_that_was_left_out_is_noticed() -> None:
    """In the prefill or in a step: a forward of ones own that skips a layer must not be answered."""
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[:1])
    with tokprune.apply(tiny.model, "fastv", **METHODS["fastv"]):
        out = tiny.model(**inputs, use_cache=True)
        cache = cache_in(out)
        cache.layers[4].keys, cache.layers[4].values = (
            t[:, :, :-1] for t in (cache.layers[4].keys, cache.layers[4].values)
        )
        with pytest.raises(TranslationError, match="layer 4 of a cache"):
            tiny.model(input_ids=out.logits[:, -1:].argmax(-1), **with_cache(cache))
