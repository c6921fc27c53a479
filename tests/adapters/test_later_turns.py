"""Later turns on a kept cache of a pruned model: text, a new picture, a cache that was filled unpruned."""

from __future__ import annotations

import copy

import pytest
import torch

import tokprune
from tests.adapters.reference import (
    HYBRID,
    QUICK,
    observe,
    prompt,
    reference,
    slow_unless,
)
from tests.adapters.shortened import RATIO, TYPES, type_names, with_text
from tests.spelling import with_cache
from tokprune.errors import TokpruneError
from tokprune.testing import picture

TURNS = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "internvl",
    "gemma3",
    "molmo2",
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in TURNS])
def test_text_turn_on_a_kept_cache(family: str, batch: int) -> None:
    """A second question over the kept cache equals asking it in one go; also on a copied and on a static cache."""
    from transformers import DynamicCache, StaticCache

    tiny = prompt(family).tiny
    model = tiny.model
    inputs = tiny.inputs(
        [
            ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
            ["A different prompt ", ("image", picture(40, 60, 2)), " what?"],
        ][:batch]
    )
    question = torch.tensor([[10, 20, 30, 40, 50]] * batch)
    config = model.config.get_text_config()
    for positions in ("keep", "compact"):
        with tokprune.apply(model, "random", ratio=RATIO, positions=positions):
            caches = [DynamicCache(config=config)]
            if family not in HYBRID:
                caches.append(StaticCache(config=config, max_cache_len=700))
            for cache in caches:
                first = model.generate(**inputs, max_new_tokens=5, **with_cache(cache))
                call = with_text(inputs, first, question)
                kept_copy = copy.deepcopy(cache)
                second = model.generate(**call, max_new_tokens=5, **with_cache(cache))
                whole = model.generate(**{**inputs, **call}, max_new_tokens=5)
                assert torch.equal(second, whole)
                third = model.generate(**with_text(inputs, second, question), max_new_tokens=5, **with_cache(cache))
                again = {**inputs, **with_text(inputs, second, question)}
                assert torch.equal(third, model.generate(**again, max_new_tokens=5))
                if isinstance(cache, DynamicCache):
                    assert torch.equal(model.generate(**call, max_new_tokens=5, **with_cache(kept_copy)), whole)


# Not Qwen: transformers wants the grids of all pictures but the pixels of the new one only. Not OneVision: a picture's
# tiling
# depends on how many there are. Not Molmo 2: its pictures attend to each other across turns when they come in one go.
NEW_IMAGE = ["llava", "llava_next", "internvl", "vipllava", "gemma3", "idefics3", "mistral3"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in NEW_IMAGE])
def test_turn_with_a_new_picture_on_a_kept_cache(family: str, batch: int) -> None:
    from transformers import DynamicCache

    tiny = prompt(family).tiny
    model = tiny.model
    firsts, added = [picture(60, 40, 1), picture(40, 60, 2)][:batch], picture(40, 40, 9)
    inputs = tiny.inputs([["Hello " * (i + 1), ("image", p), " what is this?"] for i, p in enumerate(firsts)])
    more = tiny.inputs([[" and now ", ("image", added), " compare?"]] * batch)
    both = tiny.inputs([[("image", p), ("image", added)] for p in firsts])
    start = int(more["input_ids"][0, 0] == tiny.processor.tokenizer.bos_token_id)
    new = more["input_ids"][:, start:]
    types = next((more[name][:, start:] for name in type_names(more)), None)
    pixels = {k: v for k, v in more.items() if k not in ("input_ids", "attention_mask", *TYPES)}
    all_pixels = {k: v for k, v in both.items() if k not in ("input_ids", "attention_mask", *TYPES)}
    for positions in ("keep", "compact"):
        with tokprune.apply(model, "random", ratio=RATIO, positions=positions) as pruning:
            cache = DynamicCache(config=model.config.get_text_config())
            first = model.generate(**inputs, max_new_tokens=5, **with_cache(cache))
            call = with_text(inputs, first, new, types)
            second = model.generate(**call, **pixels, max_new_tokens=5, **with_cache(cache))
            assert len(pruning.last.streams) == batch, "only the new pictures are chosen from"
            whole = model.generate(**call, **all_pixels, max_new_tokens=5)
            assert len(pruning.last.streams) == 2 * batch
        assert torch.equal(second, whole)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3"])
def test_pruned_turn_on_an_unpruned_cache(family: str, positions: str) -> None:
    """Pruning that starts in the middle of a conversation, against brute force over the whole conversation."""
    from transformers import DynamicCache

    tiny = prompt(family).tiny
    model, added = tiny.model, picture(40, 40, 9)
    firsts = [picture(60, 40, 1), picture(40, 60, 2)]
    inputs = tiny.inputs([["Hello " * (i + 1), ("image", p), " what is this?"] for i, p in enumerate(firsts)])
    more = tiny.inputs([[" and now ", ("image", added), " compare?"]] * 2)
    both = tiny.inputs([[("image", p), ("image", added)] for p in firsts])
    start = int(more["input_ids"][0, 0] == tiny.processor.tokenizer.bos_token_id)
    types = next((more[name][:, start:] for name in type_names(more)), None)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**inputs, max_new_tokens=5, **with_cache(cache))
    call = with_text(inputs, first, more["input_ids"][:, start:], types)
    held = cache.get_seq_length()
    with tokprune.apply(model, "random", ratio=RATIO, positions=positions) as pruning:
        second = model.generate(**call, pixel_values=more["pixel_values"], max_new_tokens=5, **with_cache(cache))
        keep = pruning.last.keep
    assert keep.shape[1] == call["input_ids"].shape[1] - held, "earlier turns are not touched"
    native = observe(tiny, {**call, "pixel_values": both["pixel_values"]})
    whole = torch.cat([native.real[:, :held], keep], 1)
    tokens = second[:, -5:]
    answer = reference(tiny, native, whole, positions, tokens[:, :-1])
    steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)
    assert torch.equal(steps[..., :256].argmax(-1), tokens)


def test_static_cache_after_reset_is_as_new() -> None:
    from transformers import StaticCache

    case = prompt("llava")
    model = case.tiny.model
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    other = case.tiny.inputs([["Something ", ("image", picture(40, 60, i)), " else, is it?"] for i in (8, 9)])
    with tokprune.apply(model, "random", ratio=RATIO):
        model.generate(**case.inputs, max_new_tokens=4, **with_cache(cache))
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model.generate(**other, max_new_tokens=4, **with_cache(cache))
        assert torch.equal(again, model.generate(**other, max_new_tokens=4))
        cache.reset()
    unpruned = model.generate(**other, max_new_tokens=4, **with_cache(cache))
    assert torch.equal(unpruned, model.generate(**other, max_new_tokens=4))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_kept_cache_without_its_pruning_is_refused(family: str) -> None:
    """A model without hooks would take prompt columns for keys and answer nonsense; it must say so instead."""
    from transformers import DynamicCache

    case = prompt(family)
    model = case.tiny.model
    cache = DynamicCache(config=model.config.get_text_config())
    pruning = tokprune.apply(model, "random", ratio=RATIO)
    first = model.generate(**case.inputs, max_new_tokens=4, **with_cache(cache))
    call = with_text(case.inputs, first, torch.tensor([[10, 20, 30]] * 2))
    wanted = model.generate(**call, max_new_tokens=4, **with_cache(copy.deepcopy(cache)))
    pruning.remove()
    with pytest.raises(TokpruneError):
        model.generate(**call, max_new_tokens=4, **with_cache(cache))
    with tokprune.apply(model, "divprune", ratio=0.5):  # any pruning knows how to read it
        assert torch.equal(model.generate(**call, max_new_tokens=4, **with_cache(cache)), wanted)
