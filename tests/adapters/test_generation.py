"""generate() in all its ways, later turns, hand-written loops, training and wrappers, on pruned models.

The yardstick is the unpruned model on a prompt that was shortened by hand: embeddings (or encoder rows) cut, positions
counted by hand, rows of different length padded again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import (
    HYBRID,
    QUICK,
    VIDEO,
    Native,
    Prompt,
    apart,
    observe,
    placeholder_ids,
    prompt,
    prompt_of,
    recount,
    reference,
    run,
    samples,
)
from tests.spelling import cache_in, with_cache
from tokprune.errors import TokpruneError
from tokprune.testing import FAMILIES, TinyVLM, build, clip, picture

TOLERANCE = 1e-4
RATIO = 0.2
NEW = 6
TYPES = ("token_type_ids", "mm_token_type_ids")

used: dict[str, TinyVLM] = {}


@pytest.fixture(autouse=True)
def unpruned_afterwards() -> Iterator[None]:
    """The models are shared: a failing test must not leave its pruning behind for the next one."""
    yield
    for tiny in used.values():
        tokprune.remove(tiny.model)


def given(family: str, kind: str = "image") -> Prompt:
    case = prompt(family, kind)
    used[family] = case.tiny
    return case


def slow_unless(quick: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=[] if quick else [pytest.mark.slow])


# -- a prompt shortened by hand ------------------------------------------------------------------------------------------------


def shorten(case: Prompt, keep: Tensor, positions: str, native: Native | None = None) -> dict[str, Tensor]:
    """ids, embeds, mask, types and position ids of the kept columns, padded on the left to one length."""
    native = native or case.generate
    width = int(keep.sum(1).max())
    batch, dim = len(keep), native.embeds.shape[-1]
    ids = torch.full((batch, width), 256)
    embeds = torch.zeros(batch, width, dim, dtype=native.embeds.dtype)
    mask = torch.zeros(batch, width, dtype=torch.long)
    types = torch.zeros(batch, width, dtype=torch.long)
    axes = 4 if native.mrope else 1
    where = torch.zeros(axes, batch, width, dtype=torch.long)
    for row in range(batch):
        count = int(keep[row].sum())
        here = slice(width - count, width)
        ids[row, here] = native.ids[row, keep[row]]
        embeds[row, here] = native.embeds[row, keep[row]]
        mask[row, here] = 1
        types[row, here] = native.types[row, keep[row]].long()
        if positions == "compact":
            numbers = recount(native, keep, row)[0]
        else:
            numbers = native.positions[..., row, keep[row]].reshape(-1, count)
        where[axes - len(numbers) :, row, here] = numbers
        if native.mrope:
            where[0, row, here] = torch.arange(count)
    return {
        "input_ids": ids,
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "types": types,
        "position_ids": where if native.mrope else where[0],
    }


def type_names(inputs: Any) -> list[str]:
    return [name for name in TYPES if name in inputs]


def encoder_rows(case: Prompt, keep: Tensor, by_row: bool) -> dict[str, Any]:
    """The encoder outputs of the unpruned model with the rows of dropped placeholders cut by hand (images only)."""
    model, inputs = case.tiny.model, case.inputs
    base = model.base_model
    names = inspect.signature(base.get_image_features).parameters
    output = copy.copy(base.get_image_features(**{k: v for k, v in inputs.items() if k in names}, return_dict=True))

    def cut(features: Any) -> Any:
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
        pieces, start = [], 0
        for row in range(len(keep)):
            stay = keep[row][case.visual[row]]
            pieces.append(rows[start : start + len(stay)][stay])
            start += len(stay)
        assert start == len(rows)
        if by_row:
            return pieces
        whole = torch.cat(pieces)
        return whole[None] if isinstance(features, Tensor) else [whole]

    output.pooler_output = cut(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [cut(plane) for plane in output.deepstack_features]
    return {"image": output}


BLOCKWISE = (
    "gemma3",
    "paligemma",
    "molmo2",
)  # image tokens see each other both ways: chunks cut those blocks, natively too

NO_EMBEDS = ("gemma3", "paligemma")  # their generate() does not take inputs_embeds


def oracle(case: Prompt, keep: Tensor, positions: str, options: dict[str, Any]) -> Any:
    """Native generate() on the shortened prompt. Its embeddings go in directly, or as encoder rows where planes follow."""
    options = dict(options)
    short = shorten(case, keep, positions)
    call = {
        "input_ids": short["input_ids"],
        "attention_mask": short["attention_mask"],
        "position_ids": short["position_ids"],
        **dict.fromkeys(type_names(case.inputs), short["types"]),
    }
    options.pop("use_cache", None)
    options.pop("prompt_lookup_num_tokens", None)
    if case.tiny.family == "qwen3_vl":
        call["mm_encoder_outputs"] = encoder_rows(case, keep, by_row=True)
    elif case.tiny.family in NO_EMBEDS or (case.tiny.family in BLOCKWISE and "prefill_chunk_size" in options):
        call["mm_encoder_outputs"] = encoder_rows(case, keep, by_row=False)
    else:
        call["inputs_embeds"] = short["inputs_embeds"]
        options.pop("prefill_chunk_size", None)  # transformers chunks ids, not embeddings; the result is the same
    return generate(case, call, options)


def generate(case: Prompt, inputs: Any, options: dict[str, Any]) -> Any:
    """New tokens (and beam scores) of a seeded generate()."""
    torch.manual_seed(7)
    more = {"return_dict_in_generate": True, "output_scores": True}
    out = case.tiny.model.generate(**inputs, max_new_tokens=NEW, **more, **options)
    length = inputs["input_ids"].shape[1]
    repeats = len(out.sequences) // len(inputs["input_ids"])
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"].repeat_interleave(repeats, 0)), (
        "the prompt changed"
    )
    return out.sequences[:, length:], getattr(out, "sequences_scores", None)


SCENARIOS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beam, several returned": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.4},
    "static cache": {"cache_implementation": "static"},
    "static cache, beam": {"cache_implementation": "static", "num_beams": 2},
    "chunked prefill": {"prefill_chunk_size": 16},
    "chunked prefill, static cache": {"prefill_chunk_size": 16, "cache_implementation": "static"},
    "chunked prefill, beam": {"prefill_chunk_size": 16, "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def works_natively(family: str, scenario: str, kind: str = "image") -> bool:
    """Whether transformers itself can do it; what it cannot, pruning cannot either."""
    if "chunked" in scenario and family in ("ovis2", "fast_vlm", "perception_lm"):
        return False  # raises: raw pixels cannot be split, or the placeholders are other ids than the features'
    if "chunked" in scenario and kind != "image" and family in ("glm4v", "video_llama_3"):
        return False  # wrong tokens: its clips stand under the images' id; raises: its compression mask is not split
    if scenario == "prompt lookup" and family in HYBRID:
        return False  # raises: a recurrent state cannot be rolled back
    # glm4v repeats the images of a two-image prompt as A, A, B, B: wrong for beams, even with top_k=1
    return not (family == "glm4v" and ("beam" in scenario or scenario == "return sequences"))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_generation_equals_that_of_a_shortened_prompt(family: str, scenario: str) -> None:
    if not works_natively(family, scenario):
        pytest.skip("fails natively")
    case, options = given(family), SCENARIOS[scenario]
    if scenario == "prompt lookup":  # transformers drafts for one prompt at a time
        case = prompt_of(case.tiny, samples("image")[:1])
    elif family in BLOCKWISE and {"num_beams", "num_return_sequences"} & options.keys():
        case = prompt_of(case.tiny, samples("image")[1:])  # encoder rows of unequal prompts cannot be repeated natively
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, "random", ratio=RATIO, positions=positions) as pruning:
            tokens, scores = generate(case, case.inputs, options)
        keep = pruning.last.keep
        if len(keep) != len(case.real):  # beams repeat prompts
            repeats = len(keep) // len(case.real)
            assert torch.equal(keep, keep[::repeats].repeat_interleave(repeats, 0))
            keep = keep[::repeats]
        if scenario == "no cache":  # planned anew in each step; the last plan has the new tokens, too
            keep = keep[:, : case.real.shape[1]]
        wanted, wanted_scores = oracle(case, keep, positions, options)
        assert torch.equal(tokens, wanted)
        if scores is not None:
            torch.testing.assert_close(scores, wanted_scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["ovis2", "fast_vlm", "perception_lm"])
def test_chunked_prefill_that_fails_natively_fails_pruned(family: str) -> None:
    case = given(family)
    with pytest.raises((TypeError, ValueError)) as native:
        case.tiny.model.generate(**case.inputs, max_new_tokens=2, prefill_chunk_size=16)
    with (
        tokprune.apply(case.tiny.model, "random", ratio=RATIO),
        pytest.raises(type(native.value)),
    ):
        case.tiny.model.generate(**case.inputs, max_new_tokens=2, prefill_chunk_size=16)
    assert torch.equal(run(case.tiny, case.inputs).logits, case.unpruned.logits)


@pytest.mark.parametrize("scenario", ["greedy", "beam", "static cache", "chunked prefill"])
@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f == "internvl" and k == "video", f, k) for f in VIDEO for k in ("video", "mixed")]
)
def test_generation_over_clips(family: str, kind: str, scenario: str) -> None:
    """Steps after the prefill against the brute-force reference; the tokens of cacheless and cached decoding agree."""
    tiny = given(family).tiny
    if kind == "mixed" and not tiny.spec.mixes:
        pytest.skip("takes images or clips, not both")
    if not works_natively(family, scenario, kind):
        pytest.skip("fails natively")
    case = given(family, kind)
    greedy = SCENARIOS[scenario] if scenario != "beam" else {"num_beams": 2, "num_return_sequences": 2}
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "random", ratio=RATIO, positions=positions) as pruning:
            tokens, scores = generate(case, case.inputs, greedy)
        keep = pruning.last.keep[:: len(pruning.last.keep) // len(case.real)]
        if scenario == "beam":
            for i in range(2):  # each beam's score is the mean log-probability of its tokens
                answer = reference(tiny, case.generate, keep, positions, tokens[i::2, :-1])
                steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)
                told = steps.log_softmax(-1).gather(-1, tokens[i::2, :, None])[..., 0]
                torch.testing.assert_close(scores[i::2], told.mean(-1), rtol=0, atol=10 * TOLERANCE)
            continue
        answer = reference(tiny, case.generate, keep, positions, tokens[:, :-1])
        steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)[..., :256]
        assert torch.equal(steps.argmax(-1), tokens)


def test_streamer_and_stopping_see_the_prompt_as_written() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            pass

    tiny = given("llava").tiny
    inputs = tiny.inputs(samples("image")[:1])
    length = inputs["input_ids"].shape[1]
    lengths: list[int] = []

    def watch(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(lengths) == 4)

    streamer = Collect()
    with tokprune.apply(tiny.model, "random", ratio=RATIO):
        out = tiny.model.generate(**inputs, max_length=length + 9, streamer=streamer, stopping_criteria=[watch])
        assert tiny.model.generate(**inputs, max_length=length + 3).shape[1] == length + 3
    assert lengths == [length + 1, length + 2, length + 3, length + 4]
    assert torch.equal(torch.cat(streamer.pieces), out[0])


# -- later turns ------------------------------------------------------------------------------------------------------------------


def with_text(inputs: Any, sequences: Tensor, new: Tensor, types: Tensor | None = None) -> dict[str, Tensor]:
    """The call of a later turn: everything so far, then `new`; masks and type ids grown to match."""
    ids = torch.cat([sequences, new], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    call = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)}
    for name in type_names(inputs):
        grown = ids.shape[1] - inputs[name].shape[1] - (0 if types is None else types.shape[1])
        tail = [] if types is None else [types]
        call[name] = torch.cat([torch.nn.functional.pad(inputs[name], (0, grown)), *tail], 1)
    return call


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

    tiny = given(family).tiny
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


# Not Qwen: transformers wants the grids of all pictures but the pixels of the new one only. Not OneVision: a picture's tiling
# depends on how many there are. Not Molmo 2: its pictures attend to each other across turns when they come in one go.
NEW_IMAGE = ["llava", "llava_next", "internvl", "vipllava", "gemma3", "idefics3", "mistral3"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in NEW_IMAGE])
def test_turn_with_a_new_picture_on_a_kept_cache(family: str, batch: int) -> None:
    from transformers import DynamicCache

    tiny = given(family).tiny
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

    tiny = given(family).tiny
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

    case = given("llava")
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

    case = given(family)
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


# -- loops written by hand ----------------------------------------------------------------------------------------------------------


def loop(case: Prompt, explicit: bool, steps: int) -> Iterator[Tensor]:
    """Greedy decoding over logical lengths, as a user writes it; yields the last logits of each step."""
    model, mask = case.tiny.model, case.inputs["attention_mask"]
    first = 1 if case.tiny.family == "paligemma" else 0

    def where(mask: Tensor) -> dict[str, Tensor]:
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + first} if explicit else {}

    forward = torch.no_grad()(model.__call__)  # not a with block: it would stay open while the generator rests
    out = forward(**case.inputs, **where(mask), use_cache=True)
    for _ in range(steps):
        yield out.logits[:, -1]
        token = out.logits[:, -1, :256].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        last = {name: value[:, -1:] for name, value in where(mask).items()}
        out = forward(input_ids=token, attention_mask=mask, **with_cache(cache_in(out)), **last)
    assert int(cache_in(out).get_seq_length()) == mask.shape[1], "the cache answers with the prompt's length"
    yield out.logits[:, -1]


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_hand_written_decode_loop(family: str) -> None:
    case = given(family)
    tolerance = 1e-3 if family in HYBRID else TOLERANCE  # see test_reference.py
    ways = [False] if case.forward.mrope else [False, True]
    for explicit in ways:
        native = case.generate if explicit else case.forward
        for positions in ("keep", "compact"):
            with tokprune.apply(case.tiny.model, "random", ratio=RATIO, positions=positions) as pruning:
                logits = torch.stack(list(loop(case, explicit, 4)), 1)
            tokens = logits[..., :256].argmax(-1)[:, :-1]
            answer = reference(case.tiny, native, pruning.last.keep, positions, tokens)
            assert apart(logits[:, 0], [p[-1] for p in answer.prompt]) < tolerance
            assert apart(logits[:, 1:], answer.steps) < tolerance


@pytest.mark.parametrize(
    "family", ["llava_next", "internvl"]
)  # Qwen's rope_deltas live on the model: natively mixed up
def test_interleaved_loops_do_not_mix(family: str) -> None:
    """Two prompts decoded turn by turn on one model: the record of each rides on its own cache."""
    tiny = given(family).tiny
    a, b = given(family), prompt_of(tiny, [["Short ", ("image", picture(40, 60, 5)), " one, and another text?"]])
    with tokprune.apply(tiny.model, "random", ratio=RATIO):
        alone = [list(loop(case, False, 4)) for case in (a, b)]
        together = list(zip(loop(a, False, 4), loop(b, False, 4), strict=True))
    for i in range(2):
        assert all(torch.equal(x, pair[i]) for x, pair in zip(alone[i], together, strict=True))


@pytest.mark.parametrize("method", ["random", "hired"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_threads_share_one_pruned_model(family: str, method: str) -> None:
    case = given(family)
    other = prompt_of(case.tiny, [["Short ", ("image", picture(40, 60, 5)), " one, and another text?"]])
    with tokprune.apply(case.tiny.model, method, ratio=RATIO):
        wanted = [generate(c, c.inputs, {})[0] for c in (case, other)]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(case.tiny.model.generate, **c.inputs, max_new_tokens=NEW) for c in (case, other) * 3]
            done = [job.result() for job in jobs]
    for i, tokens in enumerate(done):
        assert torch.equal(tokens[:, -NEW:], wanted[i % 2])


# -- training -------------------------------------------------------------------------------------------------------------------------


def labels_of(case: Prompt) -> Tensor:
    """Every text token is a target; pictures and padding are not, nor a first token, which only padding could foretell."""
    first = torch.nn.functional.pad(case.real, (1, 0))[:, :-1] < case.real
    return case.inputs["input_ids"].masked_fill(case.visual | ~case.real | first, -100)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize(
    "family", [slow_unless(f in QUICK, f) for f in (*QUICK, "llava_onevision", "qwen2_vl", "gemma3")]
)
def test_loss_and_gradients_equal_those_of_the_short_sequence(family: str, positions: str) -> None:
    tiny = build(family)
    case = prompt_of(tiny, samples("image"))
    model = tiny.model.train()
    labels = labels_of(case)
    with tokprune.apply(model, "random", ratio=RATIO, positions=positions) as pruning:
        out = model(**case.inputs, labels=labels)
        got = gradients(model, out.loss)
        keep = pruning.last.keep
        model.gradient_checkpointing_enable()
        again = model(**case.inputs, labels=labels)
        checkpointed = gradients(model, again.loss)
        model.gradient_checkpointing_disable()
    short = shorten(case, keep, positions, case.forward)
    cut_labels = torch.full(short["input_ids"].shape, -100)
    for row in range(len(keep)):
        cut_labels[row, -int(keep[row].sum()) :] = labels[row, keep[row]]
    logits = model(
        input_ids=short["input_ids"],
        attention_mask=short["attention_mask"],
        position_ids=short["position_ids"],
        mm_encoder_outputs=encoder_rows(case, keep, by_row=False),
        **dict.fromkeys(type_names(case.inputs), short["types"]),
    ).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), cut_labels[:, 1:].flatten())
    wanted = gradients(model, loss)
    assert abs(float(out.loss) - float(loss)) < 1e-5
    assert abs(float(again.loss) - float(loss)) < 1e-5
    assert got.keys() == wanted.keys() == checkpointed.keys()
    assert sum(float(g.abs().sum()) for name, g in got.items() if "vis" in name) > 0, "the tower learns"
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=TOLERANCE)
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_training_with_signals_and_checkpointing(family: str) -> None:
    """Checkpointing runs blocks again in the backward pass; probes in the tower must not trip over it."""
    tiny = build(family)
    case = prompt_of(tiny, samples("image"))
    model = tiny.model.train()
    with tokprune.apply(model, "hired", ratio=RATIO):
        plain = gradients(model, model(**case.inputs, labels=labels_of(case)).loss)
        model.gradient_checkpointing_enable()
        for _ in range(2):
            got = gradients(model, model(**case.inputs, labels=labels_of(case)).loss)
            for name, value in plain.items():
                torch.testing.assert_close(got[name], value, rtol=1e-3, atol=TOLERANCE)


# -- outputs and inputs of other kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in (*QUICK, "gemma3", "qwen3_5")])
def test_hidden_states_have_the_length_of_the_prompt(family: str) -> None:
    case = given(family)
    model, length = case.tiny.model, case.real.shape[1]
    with tokprune.apply(model, "random", ratio=RATIO) as pruning, torch.no_grad():
        out = model(**case.inputs, output_hidden_states=True)
        plain = model(**case.inputs)
        generated = model.generate(
            **case.inputs, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True
        )
    keep = pruning.last.keep
    assert len(out.hidden_states) == model.config.get_text_config().num_hidden_layers + 1
    assert all(h.shape[1] == length for h in out.hidden_states)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    embeds = torch.stack([case.forward.embeds[row, keep[row]][-4:] for row in range(len(keep))])
    assert torch.equal(out.hidden_states[0][:, -4:], embeds), "the first ones are the embeddings"
    for row in range(len(keep)):  # a dropped column answers with the nearest kept one before it
        for column in (~keep[row] & case.visual[row]).nonzero().flatten().tolist():
            before = int(keep[row, :column].nonzero()[-1])
            assert torch.equal(out.logits[row, column], out.logits[row, before])
    assert len(generated.hidden_states) == 3
    assert generated.hidden_states[1][0].shape[1] == 1


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_logits_to_keep_and_tuples(family: str) -> None:
    case = given(family)
    model = case.tiny.model
    with torch.no_grad():
        heeded = model(**case.inputs, logits_to_keep=3).logits.shape[1] == 3  # some models ignore it
    with tokprune.apply(model, "random", ratio=RATIO), torch.no_grad():
        whole = model(**case.inputs).logits
        if not heeded:
            assert torch.equal(model(**case.inputs, logits_to_keep=3).logits, whole)
            return
        assert apart(model(**case.inputs, logits_to_keep=3).logits, whole[:, -3:]) < TOLERANCE
        some = torch.tensor([0, 5, whole.shape[1] - 1])
        assert apart(model(**case.inputs, logits_to_keep=some).logits, whole[:, some]) < TOLERANCE
        answer = model(**case.inputs, return_dict=False)
    assert isinstance(answer, tuple)
    assert torch.equal(answer[0], whole)


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_half_precision(family: str) -> None:
    tiny = build(family, dtype=torch.bfloat16)
    inputs = tiny.inputs(samples("image"))
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "divprune", ratio=RATIO, positions=positions) as pruning:
            got = run(tiny, inputs)
        keep = pruning.last.keep
        assert got.logits.dtype == torch.bfloat16
        answer = reference(tiny, observe(tiny, inputs), keep, positions, got.tokens[:, :-1])
        mine = torch.cat([got.steps[:, 0], got.steps[:, 1:].flatten(0, 1)]).float()
        theirs = torch.cat([torch.stack([p[-1] for p in answer.prompt]), answer.steps.flatten(0, 1)]).float()
        alike = torch.nn.functional.cosine_similarity(mine, theirs, dim=-1)
        assert (alike > 0.995).all(), alike


@pytest.mark.parametrize("family", [*QUICK, "gemma3"])
def test_inputs_embeds_beside_pixels(family: str) -> None:
    case = given(family)
    model = case.tiny.model
    rest = {k: v for k, v in case.inputs.items() if k != "input_ids"}
    embeds = model.get_input_embeddings()(case.inputs["input_ids"]).detach()
    if case.forward.mrope:  # transformers cannot find the pictures' places without ids
        rest["position_ids"] = case.forward.positions
    with torch.no_grad():
        native = model(inputs_embeds=embeds, **rest).logits
        assert apart([native[case.real]], [case.unpruned.logits[case.real]]) < TOLERANCE
        with tokprune.apply(model, "random", ratio=RATIO) as pruning:
            got = model(inputs_embeds=embeds, **rest).logits
            keep = pruning.last.keep
            wanted = model(**case.inputs).logits
            assert torch.equal(keep, pruning.last.keep)
            assert apart([got[keep]], [wanted[keep]]) < TOLERANCE
            if not case.forward.mrope and family != "gemma3":  # gemma3 does not take them in generate()
                new = model.generate(inputs_embeds=embeds, **rest, max_new_tokens=4)
                assert torch.equal(new, model.generate(**case.inputs, max_new_tokens=4)[:, -4:])


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen3_vl"])
def test_features_encoded_before_apply(family: str) -> None:
    """Features that the user encoded earlier are pruned too; only their geometry is unknown."""
    case = given(family)
    model = case.tiny.model
    names = inspect.signature(model.base_model.get_image_features).parameters
    with torch.no_grad():
        output = model.base_model.get_image_features(
            **{k: v for k, v in case.inputs.items() if k in names}, return_dict=True
        )
    rest = {k: v for k, v in case.inputs.items() if k != "pixel_values"}
    for positions in ("keep", "compact"):
        with tokprune.apply(model, "divprune", ratio=RATIO, positions=positions) as pruning, torch.no_grad():
            logits = model(**rest, mm_encoder_outputs={"image": output}).logits
            keep = pruning.last.keep
            assert all("geometry" in record.note for record in pruning.last.streams)
            tokens = model.generate(**rest, mm_encoder_outputs={"image": output}, max_new_tokens=5)[:, -5:]
            assert torch.equal(pruning.last.keep, keep)
        prompt_logits = reference(case.tiny, case.forward, keep, positions, tokens[:, :0]).prompt
        assert apart([logits[row][keep[row]] for row in range(2)], prompt_logits) < TOLERANCE
        answer = reference(case.tiny, case.generate, keep, positions, tokens[:, :-1])
        steps = torch.cat([torch.stack([p[-1] for p in answer.prompt])[:, None], answer.steps], 1)
        assert torch.equal(steps[..., :256].argmax(-1), tokens)


def test_clip_that_the_model_itself_thins_out() -> None:
    """VideoLLaMA 3 drops repeated patches of a still clip; pruning chooses among the rest."""
    tiny = build("video_llama_3")
    still = np.repeat(clip(1, seed=1), 4, axis=0)
    parts = [["v ", ("video", still), " what?"], ["a longer ", ("video", clip(4, seed=2)), " ok?"]]
    case = prompt_of(tiny, parts)
    assert int(case.visual[0].sum()) < int(case.visual[1].sum())
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "divprune", ratio=RATIO, positions=positions) as pruning:
            got = run(tiny, case.inputs)
        assert [r.total for r in pruning.last.streams] == case.visual.sum(1).tolist()
        assert case.distance(pruning.last.keep, positions, got) < TOLERANCE


# -- copies and wrappers --------------------------------------------------------------------------------------------------------------


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

    tiny = given(family).tiny
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


def test_placeholders_are_never_generated() -> None:
    """What keeps the turns above honest: a random model that wrote a placeholder would break its next turn, natively too."""
    for family in QUICK:
        model = given(family).tiny.model
        assert placeholder_ids(model.config) <= set(model.generation_config.suppress_tokens)
