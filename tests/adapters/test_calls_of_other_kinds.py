"""Calls that are right natively and must be right pruned: embeddings beside pixels, chunks, smaller static caches,
packs of questions, prompts that no template knows, plug-ins that break their contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.conversations import TYPES
from tests.adapters.reference import HYBRID, QUICK, prompt, shared
from tests.spelling import with_cache
from tokprune.adapters.query import find_question, plain_question
from tokprune.errors import MissingQueryError, OptionError, TokpruneError
from tokprune.methods.base import ConnectorMethod, top
from tokprune.registry import register_method
from tokprune.testing import FAMILIES, build, picture
from tokprune.tokens import Merge, Selection

NEW = 4
CHUNKS_FAIL = ("ovis2", "fast_vlm", "perception_lm", "gemma3", "paligemma", "molmo2")


def families(*quick: str, but: tuple[str, ...] = ()) -> list[Any]:
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in FAMILIES if f not in but]


def new_tokens(model: Any, **call: Any) -> torch.Tensor:
    return model.generate(**call, max_new_tokens=NEW)[:, -NEW:]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava_next", "aya_vision", "cohere2_vision"])
def test_embeddings_beside_pixels(family: str) -> None:
    """Tiles are told apart by the words between them, also where the prompt comes as embeddings."""
    case = prompt(family, "image")
    model = case.tiny.model
    rest = {k: v for k, v in case.inputs.items() if k != "input_ids"}
    embeds = model.get_input_embeddings()(case.inputs["input_ids"]).detach()
    with tokprune.apply(model, "random", ratio=0.3) as pruning:
        wanted = new_tokens(model, **case.inputs)
        keep, streams = pruning.last.keep, len(pruning.last.streams)
        got = new_tokens(model, inputs_embeds=embeds, **rest)
        assert len(pruning.last.streams) == streams
        assert torch.equal(pruning.last.keep, keep)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("family", families(*QUICK, but=CHUNKS_FAIL))
def test_chunked_prefill_of_a_batch_and_on_a_filled_cache(family: str, ratio: float) -> None:
    """Two prompts in chunks, alone and after a system prompt that is in the cache already, equal the prefill in one
    go."""
    from transformers import DynamicCache

    case = prompt(family, "image")
    model = case.tiny.model
    system = case.tiny.inputs([["You are a system prompt. "]] * 2)
    call = dict(case.inputs)
    for name in ("input_ids", "attention_mask", *TYPES):
        if name in call:
            call[name] = torch.cat([system.get(name, torch.zeros_like(system["input_ids"])), call[name]], 1)

    def answers(**more: Any) -> list[torch.Tensor]:
        out = [new_tokens(model, **case.inputs, **more)]
        if family in HYBRID:
            return out  # a ragged later turn is refused
        cache = DynamicCache(config=model.config.get_text_config())
        first = {k: system[k] for k in ("input_ids", "attention_mask")}
        model.generate(**first, max_new_tokens=1, **with_cache(cache))
        return [*out, new_tokens(model, **call, **more, **with_cache(cache))]

    try:
        plain = answers()
    except Exception:
        pytest.skip("fails natively")
    with tokprune.apply(model, "random", ratio=ratio):
        whole, chunks = answers(), answers(prefill_chunk_size=16)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunks, strict=True))
    if ratio == 1.0:
        assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_smaller_static_cache(family: str) -> None:
    """As long as the kept prompt, newline tokens included, and what is generated; a shorter one is refused with the
    number."""
    from transformers import StaticCache

    case = prompt(family, "image")
    model, config = case.tiny.model, case.tiny.model.config.get_text_config()
    with tokprune.apply(model, "random", ratio=0.3) as pruning:
        wanted = new_tokens(model, **case.inputs)
        length = pruning.last.length
        cache = StaticCache(config=config, max_cache_len=length + NEW)
        assert torch.equal(new_tokens(model, **case.inputs, **with_cache(cache)), wanted)
        with pytest.raises(OptionError, match=f"has {length}"):
            new_tokens(model, **case.inputs, **with_cache(StaticCache(config=config, max_cache_len=length - 2)))


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asking() -> Iterator[None]:
    from tokprune import registry

    @register_method("only_asks", paper="a test", query_aware=True)
    @dataclass(frozen=True)
    class Asks(ConnectorMethod):
        def select(self, tokens, keep):
            return Selection(top(tokens.features.float() @ tokens.question().embeddings.float().mean(0), keep))

    yield
    registry._methods.pop("only_asks")


def test_two_questions_for_four_prompts_are_refused(asking: None) -> None:
    tiny = shared("llava")
    four = tiny.inputs([[("image", picture(40, 40, i)), " what?"] for i in range(4)])
    with tokprune.apply(tiny.model, "only_asks", ratio=0.3, processor=tiny.processor) as pruning:
        with pruning.query(["one?", "two?"]), pytest.raises(MissingQueryError, match="2 questions"):
            tiny.model(**four)
        with pruning.query(["one?", "two?"]), pytest.raises(MissingQueryError, match="2 questions"):
            tiny.model.generate(**four, max_new_tokens=2)
        two = tiny.inputs([[("image", picture(40, 40, i)), " what?"] for i in range(2)])
        with pruning.query(["one?", "two?"]):
            tiny.model.generate(**two, max_new_tokens=2, num_return_sequences=2, do_sample=True)
        assert {s.question for s in pruning.last.streams} == {"one?", "two?"}


@pytest.mark.parametrize(
    "text",
    [
        "USER: {}\nWhat is this? ASSISTANT:",
        "{} Question: What is this? Answer:",
        "[INST] {} Describe it. [/INST]",
        "Human: {} Describe the colours. AI:",
        "{} What is this?",
        "{} Q: What is this? A:",
        "{}\nWhat is this?\nResponse:",
        "Instruct: {} Describe it.\nOutput:",
        "<start_of_turn>user {} Describe it.<end_of_turn><start_of_turn>model",
        "{} Frage: Was ist das? Antwort:",
    ],
)
def test_words_of_the_answer_are_no_question(asking: None, text: str) -> None:
    """generate(), generate() without a cache and a forward over prompt and answer keep the same tokens."""
    tiny = shared("llava")
    before, after = text.split("{}")
    parts = [part for part in (before, ("image", picture(60, 40, 1)), after) if part]
    inputs = tiny.inputs([parts])
    told = tiny.inputs([[*parts, " A red car. It is parked: nobody is inside. Why?"]])
    width = inputs["input_ids"].shape[1]
    with tokprune.apply(tiny.model, "only_asks", ratio=0.3, processor=tiny.processor) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=5)
        wanted, question = pruning.last.keep, pruning.last.streams[0].question
        tiny.model.generate(**inputs, max_new_tokens=5, use_cache=False)
        assert torch.equal(pruning.last.keep[:, :width], wanted)
        with torch.no_grad():
            tiny.model(**told)
        assert torch.equal(pruning.last.keep[:, :width], wanted)
        assert pruning.last.streams[0].question == question
        assert "red car" not in question


def test_options_are_part_of_the_question() -> None:
    text = "Q: Which one? A: red B: blue Answer:"
    assert plain_question(text) == (" Which one? A: red B: blue ", True)
    assert plain_question("Q: Which one? A: red") == (" Which one? ", True)


def test_a_template_that_raises_what_it_likes() -> None:
    jinja2 = pytest.importorskip("jinja2")
    tiny = build("llava")
    inputs = tiny.inputs([["USER: ", ("image", picture(40, 40, 1)), " What is it? ASSISTANT:"]])

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise jinja2.TemplateError("roles must alternate")

    tiny.processor.apply_chat_template = refuse
    text, source = find_question(tiny.processor, inputs["input_ids"][0], [tiny.model.config.image_token_id])
    assert text == "What is it?"
    assert "no known chat template" in source


# -- plug-ins ----------------------------------------------------------------------------------------------------------


BROKEN = {
    "duplicates": lambda n, k: Selection(torch.zeros(k, dtype=torch.long)),
    "unsorted": lambda n, k: Selection(torch.arange(k).flip(0)),
    "too large": lambda n, k: Selection(torch.arange(n - k + 1, n + 1)),
    "negative": lambda n, k: Selection(torch.arange(-1, k - 1)),
    "float": lambda n, k: Selection(torch.arange(k).float()),
    "a mask": lambda n, k: Selection(torch.arange(n) < k),
    "a list": lambda n, k: list(range(k)),
    "two dimensions": lambda n, k: Selection(torch.arange(k)[:, None]),
    "features of another width": lambda n, k: Selection(torch.arange(k), features=torch.zeros(k, 3)),
    "features as a list": lambda n, k: Selection(torch.arange(k), features=[[0.0]]),
    "merge rows of another shape": lambda n, k: Selection(torch.arange(k), weights=Merge(rows=torch.zeros(k, n - 1))),
    "weights that are no Merge": lambda n, k: Selection(torch.arange(k), weights=torch.zeros(k, n)),
    "an empty Merge": lambda n, k: Selection(torch.arange(k), weights=Merge()),
    "weights beside features": lambda n, k: Selection(
        torch.arange(k), weights=Merge(rows=torch.zeros(k, n)), features=torch.zeros(k, 64)
    ),
    "targets beyond the slots": lambda n, k: merged(torch.full((n,), k), torch.ones(n)),
    "targets as a mask": lambda n, k: merged(torch.ones(n, dtype=torch.bool), torch.ones(n)),
    "targets as floats": lambda n, k: merged(torch.zeros(n), torch.ones(n)),
    "scales of the slots": lambda n, k: merged(torch.zeros(n, dtype=torch.long), torch.ones(k)),
}
WRONG_COUNTS = {
    "none": lambda keeps: None,
    "one too few": lambda keeps: keeps[:-1],
    "zero": lambda keeps: [0] * len(keeps),
    "more than asked": lambda keeps: [k + 1 for k in keeps],
    "more than there are": lambda keeps: [10**6] * len(keeps),
    "a fraction": lambda keeps: [k + 0.5 for k in keeps],
}
WRONG_LISTS = {
    "none": lambda right: None,
    "one too few": lambda right: right[:-1],
    "one too many": lambda right: [*right, right[0]],
    "a single one": lambda right: right[0],
    "a generator": lambda right: (s for s in right),
}


def merged(target: torch.Tensor, scale: torch.Tensor) -> Selection:
    """A decision for 19 slots, which ratio 0.3 gives of 64 tokens."""
    return Selection(torch.arange(19), weights=Merge(target=target, scale=scale))


@pytest.mark.parametrize("kind", BROKEN)
def test_decisions_that_break_the_contract_are_refused(kind: str) -> None:
    refused(select=lambda self, tokens, keep: BROKEN[kind](len(tokens), keep))


@pytest.mark.parametrize("kind", WRONG_COUNTS)
def test_budgets_that_break_the_contract_are_refused(kind: str) -> None:
    refused(
        select=lambda self, tokens, keep: Selection(torch.arange(keep)),
        budgets=lambda self, batch, keeps: WRONG_COUNTS[kind](list(keeps)),
    )


@pytest.mark.parametrize("kind", WRONG_LISTS)
def test_batches_of_decisions_that_break_the_contract_are_refused(kind: str) -> None:
    refused(select_batch=lambda self, batch, keeps: WRONG_LISTS[kind]([Selection(torch.arange(k)) for k in keeps]))


def refused(**members: Any) -> None:
    """A method with these members is refused when it is asked, and leaves the model as it was."""
    from tokprune import registry

    plug_in = type("Breaks", (ConnectorMethod,), members)
    register_method("breaks_it", paper="a test", adaptive=True)(dataclass(frozen=True)(plug_in))
    case = prompt("llava", "image")
    try:
        with tokprune.apply(case.tiny.model, "breaks_it", ratio=0.3), pytest.raises(TokpruneError):
            case.tiny.model(**case.inputs)
    finally:
        registry._methods.pop("breaks_it")
    with torch.no_grad():
        assert torch.equal(case.tiny.model(**case.inputs).logits, case.unpruned.logits)


def test_pictures_that_do_not_belong_to_the_prompt_are_a_value_error() -> None:
    tiny = shared("llava")
    inputs = tiny.inputs([[("image", picture(40, 40, 1)), " what?"]])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    with tokprune.apply(tiny.model, "random", ratio=0.3), pytest.raises(ValueError, match="placeholder"):
        tiny.model(**inputs)
