"""In-context examples: catp(text="example") compares each picture with the words of its own example."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tokprune.errors import MissingQueryError
from tokprune.methods.connector.catp import CATP, catp
from tokprune.testing import TinyVLM, build, picture

PICTURES = [picture(40, 40, 1), picture(40, 60, 2), picture(60, 40, 3), picture(40, 40, 4)]


def turns(*parts: Any) -> dict[str, Any]:
    role = "assistant" if parts[0] == "assistant" else "user"
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts if p != "assistant"]
    return {"role": role, "content": content}


def prompt(tiny: TinyVLM) -> dict[str, Any]:
    """Two examples, the second with two pictures, and a question; and a shorter row beside them."""
    long = [
        turns(None, "Which fruit?"),
        turns("assistant", "A pear."),
        turns(None, None, "What differs?"),
        turns("assistant", "The hat."),
        turns(None, "Which animal is it?"),
    ]
    short = [turns("Look at", None, "how many?"), turns("assistant", "Two."), turns(None, "how old?")]
    texts = [tiny.processor.apply_chat_template(t, add_generation_prompt=True, tokenize=False) for t in (long, short)]
    images = [PICTURES, PICTURES[1:3]]
    return tiny.processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
@torch.no_grad()
def test_each_picture_is_compared_with_the_words_of_its_example(family: str) -> None:
    tiny = build(family)
    inputs = prompt(tiny)
    with tokprune.apply(tiny.model, "catp", text="example", ratio=0.5, processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        found = [s.question for s in pruning.report().streams]
    assert found == [
        "Which fruit? A pear.",
        "What differs? The hat.",
        "What differs? The hat.",
        "Which animal is it?",
        "how many? Two.",
        "how old?",
    ]


@torch.no_grad()
def test_the_choice_follows_those_words_and_beams_change_nothing() -> None:
    tiny = build("llava")
    inputs = prompt(tiny)
    method, seen = CATP(text="example", stretch=1.0, relevance=20.0), []

    def watch(tokens: Any, keep: int) -> Any:
        seen.append((tokens.features, tokens.question(), keep))
        return CATP.select(method, tokens, keep)

    object.__setattr__(method, "select", watch)
    with tokprune.apply(tiny.model, method, ratio=0.3, processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        kept = pruning.last.keep
        tiny.model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert [q.text for _, q, _ in seen[:6]] == [q.text for _, q, _ in seen[6:]]
    table, start = tiny.model.get_input_embeddings(), 0
    image = inputs["input_ids"] == tiny.model.config.image_token_id
    found = kept[image]
    for features, query, keep in seen[:6]:
        words = tiny.processor.tokenizer(query.text, add_special_tokens=False)["input_ids"]
        order, _ = catp(features, table(torch.tensor(words)), keep, 20.0)
        assert found[start : start + len(features)].nonzero()[:, 0].tolist() == order.sort().values.tolist()
        start += len(features)


@torch.no_grad()
def test_without_a_prompt_to_read_it_says_so() -> None:
    tiny = build("llava")
    inputs = prompt(tiny)
    embeds = tiny.model.get_input_embeddings()(inputs["input_ids"])
    with (
        tokprune.apply(tiny.model, "catp", text="example", ratio=0.5, query="what?", processor=tiny.processor),
        pytest.raises(MissingQueryError, match="text='question'"),
    ):
        tiny.model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], attention_mask=inputs["attention_mask"])
