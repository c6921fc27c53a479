"""The cache stage over generation modes, refused where it cannot be right, and gone after remove()."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.cache_reference import answer, last_layer, masked_steps
from tests.adapters.reference import language_model, samples, shared
from tests.adapters.shortened import with_text
from tests.spelling import cache_in, with_cache
from tokprune.budget import kept
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.cache.dycoke_cache import DyCokeCache
from tokprune.registry import get_method, list_methods
from tokprune.runtime.cache_record import get_state
from tokprune.testing import build, clip, picture

SHARE, NEW = 0.3, 6


# -- generation modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20}]
)
def test_batch_rows_answer_as_alone(family: str, options: dict[str, Any]) -> None:
    """Beams reorder what was decided; each prompt of a batch gets what it gets alone."""
    tiny, parts = shared(family), samples("image")
    method = DyCokeCache(layer=last_layer(tiny), similarity=0.95)
    with tokprune.apply(tiny.model, ["random", method], ratio=0.5):
        if "do_sample" in options:
            torch.manual_seed(3)
            got = tiny.model.generate(**tiny.inputs(parts[:1]), max_new_tokens=NEW, **options)
            torch.manual_seed(3)
            again = tiny.model.generate(**tiny.inputs(parts[:1]), max_new_tokens=NEW, **options)
            assert torch.equal(got, again)
            return
        both = tiny.model.generate(**tiny.inputs(parts), max_new_tokens=NEW, **options)[:, -NEW:]
        each = [tiny.model.generate(**tiny.inputs([p]), max_new_tokens=NEW, **options)[:, -NEW:] for p in parts]
    assert torch.equal(both, torch.cat(each))


def test_beams_follow_the_masked_reference() -> None:
    """The winning beam's scores are those of its own tokens with masked keys, through every reordering."""
    tiny = shared("llava")
    method = DyCokeCache(layer=1, similarity=0.9)
    inputs = tiny.inputs(samples("image")[:1])
    more = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 3, "length_penalty": 0.0}
    with tokprune.apply(tiny.model, method, ratio=SHARE):
        out = tiny.model.generate(**inputs, max_new_tokens=NEW, **more)
        first = tiny.model.generate(
            **inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        ).logits[0]
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    rest, reference = masked_steps("llava", inputs, tokens[:-1], 1, SHARE)
    logits = torch.cat([first, rest])  # beam search normalises before it suppresses tokens
    total = float(logits.log_softmax(-1).gather(1, tokens[:, None]).sum())
    assert float(out.sequences_scores[0]) == pytest.approx(total, abs=1e-3)
    assert len({frozenset(s) for s in reference.sets}) > 1


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_second_turn_on_a_kept_cache(family: str) -> None:
    """The prompt of a later turn sees all keys; its answer starts with a choice of its own, as if all came in one
    go."""
    from transformers import DynamicCache

    tiny = shared(family)
    inputs = tiny.inputs(samples("image")[:1])
    question = torch.tensor([[10, 20, 30, 40, 50]])
    with tokprune.apply(tiny.model, ["random", DyCokeCache(layer=1)], ratio=0.5) as pruning:
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        first = tiny.model.generate(**inputs, max_new_tokens=1, **with_cache(cache))
        call = with_text(inputs, first, question)
        kept_copy = copy.deepcopy(cache)
        second = tiny.model.generate(**call, max_new_tokens=NEW, **with_cache(cache))
        whole = tiny.model.generate(**{**inputs, **call}, max_new_tokens=NEW)
        assert torch.equal(second, whole)
        assert torch.equal(tiny.model.generate(**call, max_new_tokens=NEW, **with_cache(kept_copy)), whole)
        assert int(get_state(cache).visual.sum()) == sum(s.kept for s in pruning.last.streams)


def test_a_new_picture_joins_the_visual_keys() -> None:
    from transformers import DynamicCache

    tiny = shared("llava")
    inputs = tiny.inputs(samples("image")[:1])
    with tokprune.apply(tiny.model, ["random", DyCokeCache(layer=1)], ratio=0.5):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        first = tiny.model.generate(**inputs, max_new_tokens=3, **with_cache(cache))
        before = int(get_state(cache).visual.sum())
        later = tiny.inputs([[" and ", ("image", picture(40, 60, 5)), " now?"]])
        call = with_text(inputs, first, later["input_ids"])
        tiny.model.generate(**call, pixel_values=later["pixel_values"], max_new_tokens=3, **with_cache(cache))
        state = get_state(cache)
        assert int(state.visual.sum()) == 2 * before
        assert state.chosen.width == kept(2 * before, 0.3)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_interleaved_and_threaded_answers_do_not_mix(family: str) -> None:
    tiny = shared(family)
    prompts = [tiny.inputs(samples("image")[i : i + 1]) for i in range(2)]
    with tokprune.apply(tiny.model, ["random", DyCokeCache(layer=1, similarity=1.0)], ratio=0.5):
        alone = [tiny.model.generate(**p, max_new_tokens=NEW) for p in prompts]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(tiny.model.generate, **prompts[i % 2], max_new_tokens=NEW) for i in range(6)]
            done = [job.result() for job in jobs]
    assert all(torch.equal(done[i], alone[i % 2]) for i in range(6))


def test_chunked_prefill_with_a_last_chunk_of_one_token() -> None:
    """A chunk of one token is prompt, not answer: it reads all keys."""
    tiny = shared("llava")
    inputs = tiny.inputs(samples("image")[:1])
    with tokprune.apply(tiny.model, ["random", DyCokeCache(layer=1)], ratio=0.5) as pruning:
        whole, wanted = answer(tiny, inputs, NEW)
        width = pruning.last.length
        for chunk in (width - 1, 7, 1):
            tokens, logits = answer(tiny, inputs, NEW, prefill_chunk_size=chunk)
            assert torch.equal(tokens, whole)
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


def test_steps_without_a_picture_or_a_cache_are_left_alone() -> None:
    tiny = shared("llava")
    text = tiny.inputs([["no picture here"]])
    inputs = tiny.inputs(samples("image")[:1])
    unpruned = tiny.model.generate(**text, max_new_tokens=4)
    no_cache = tiny.model.generate(**inputs, max_new_tokens=4, use_cache=False)
    with tokprune.apply(tiny.model, DyCokeCache(layer=1), ratio=SHARE) as pruning:
        assert torch.equal(tiny.model.generate(**text, max_new_tokens=4), unpruned)
        assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=4, use_cache=False), no_cache)
        assert pruning.cache.steps == 0
        assert "no decode step" in str(pruning.report())
        tiny.model.generate(**inputs, max_new_tokens=4)
        assert "3 decode steps" in str(pruning.report())
        assert "all keys stay in memory" in str(pruning.report())


def test_hand_written_loop() -> None:
    tiny = shared("internvl")
    inputs = tiny.inputs(samples("image")[:1])
    with tokprune.apply(tiny.model, DyCokeCache(layer=1), ratio=SHARE), torch.no_grad():
        tokens, logits = answer(tiny, inputs, NEW)
        out, mask = tiny.model(**inputs, use_cache=True), inputs["attention_mask"]
        for step in range(NEW - 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = tiny.model(input_ids=tokens[:, step : step + 1], attention_mask=mask, **with_cache(cache_in(out)))
            torch.testing.assert_close(out.logits[:, -1], logits[:, step + 1], rtol=0, atol=1e-5)


# -- refusals and cleanliness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [({"cache_implementation": "static"}, "fixed length"), ({"prompt_lookup_num_tokens": 3}, "assisted decoding")],
)
def test_modes_that_cannot_be_right_are_refused(options: dict[str, Any], words: str) -> None:
    tiny = shared("llava")
    inputs = tiny.inputs(samples("image")[:1])
    before = tiny.model.generate(**inputs, max_new_tokens=4, **options)
    with tokprune.apply(tiny.model, DyCokeCache(layer=1), ratio=SHARE):
        with pytest.raises(UnsupportedModelError, match=words):
            tiny.model.generate(**inputs, max_new_tokens=4, **options)
        assert tiny.model.generate(**inputs, max_new_tokens=4).shape == before.shape
    assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=4, **options), before)


def test_flex_attention_is_refused() -> None:
    tiny = build("llava")
    tiny.model.base_model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        tokprune.apply(tiny.model, DyCokeCache(layer=1), ratio=SHARE)
    assert not tiny.model.base_model._forward_pre_hooks
    assert not hasattr(tiny.model, "_tokprune")


@pytest.mark.parametrize("layer", [2, 40])
def test_layers_that_do_not_exist(layer: int) -> None:
    with pytest.raises(OptionError, match="1 <= layer <= 1"):
        tokprune.apply(shared("llava").model, DyCokeCache(layer=layer), ratio=SHARE)


class Boom(Exception):
    pass


@pytest.mark.parametrize("family", ["llava", "qwen3_5"])
def test_remove_and_errors_leave_the_model_as_it_was(family: str) -> None:
    tiny = shared(family)
    inputs = tiny.inputs(samples("image"))
    hooks = [(m, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in tiny.model.modules()]
    attributes = set(tiny.model.__dict__)
    before = tiny.model.generate(**inputs, max_new_tokens=4)

    def explode(module: Any, args: Any) -> None:
        if args and args[0].shape[1] == 1:
            raise Boom

    with tokprune.apply(tiny.model, DyCokeCache(layer=last_layer(tiny)), ratio=SHARE):
        wanted = tiny.model.generate(**inputs, max_new_tokens=4)
        for module in (
            language_model(tiny.model).layers[-1].mlp,
            language_model(tiny.model).layers[-1].self_attn.v_proj,
        ):
            handle = module.register_forward_pre_hook(explode)
            with pytest.raises(Boom):
                tiny.model.generate(**inputs, max_new_tokens=4)
            handle.remove()
            assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=4), wanted)
    assert set(tiny.model.__dict__) == attributes
    assert [(m, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in tiny.model.modules()] == hooks
    assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=4), before)


@pytest.mark.parametrize("name", [n for n in list_methods("cache") if n != "mustdrop_cache"])
def test_share_of_all_changes_no_bit(name: str) -> None:
    """In decode steps as in the prompt."""
    tiny = shared("llava")
    inputs = tiny.inputs([*samples("image"), ["only words"]])
    _, wanted = answer(tiny, inputs, NEW)
    with tokprune.apply(tiny.model, get_method(name, **({"layer": 1} if name == "dycoke_cache" else {})), ratio=1.0):
        _, logits = answer(tiny, inputs, NEW)
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize(
    ("stages", "amount", "share"),
    [
        ("dycoke_cache", {"ratio": 0.5}, lambda n: kept(n, 0.5)),
        ("dycoke_cache", {"budget": 7}, lambda n: 7),
        ("dycoke_cache", {}, lambda n: kept(n, 0.3)),
        (["dycoke", "dycoke_cache"], {"ratio": 0.5}, lambda n: kept(kept(n, 0.5), 0.3)),
        (["tome", "dycoke_cache"], {"ratio": 0.5}, None),
    ],
)
def test_whose_the_ratio_is(stages: Any, amount: dict[str, Any], share: Any) -> None:
    names = [stages] if isinstance(stages, str) else stages
    methods = [DyCokeCache(layer=1) if n == "dycoke_cache" else tokprune.get_method(n) for n in names]
    tiny = shared("internvl")
    inputs = tiny.inputs([["v ", ("video", clip(4, seed=1)), " what?"]])
    with tokprune.apply(tiny.model, methods, **amount) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=3)
        total = sum(s.total for s in pruning.last.streams)  # a frame each
        visual = sum(s.kept for s in pruning.last.streams)
        assert pruning.cache.used == (share(total) if share is not None else kept(visual, 0.3))
        assert repr(pruning)
        assert str(pruning.report())


def test_copy_of_a_model_decides_for_itself() -> None:
    tiny = build("llava")
    inputs = tiny.inputs(samples("image")[:1])
    with tokprune.apply(tiny.model, DyCokeCache(layer=1, similarity=1.0), ratio=SHARE):
        wanted = tiny.model.generate(**inputs, max_new_tokens=4)
        twin = copy.deepcopy(tiny.model)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), wanted)
    tokprune.remove(twin)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), tiny.model.generate(**inputs, max_new_tokens=4))
