"""The question is found in the prompt, whatever the chat template, and given ones are taken as they are."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.adapters.query import find_question
from tokprune.errors import MissingQueryError
from tokprune.methods.base import ConnectorMethod, top
from tokprune.registry import register_method
from tokprune.testing import build, clip, picture
from tokprune.tokens import Selection

QUESTION = "What colour is the Car on the left?"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
@pytest.mark.parametrize("system", [False, True])
def test_cut_out_of_the_chat_template(family, system):
    tiny = build(family)
    turns = [{"role": "system", "content": [{"type": "text", "text": "You are terse."}]}] if system else []
    turns += [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "An earlier question?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "An earlier answer."}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    prompt = tiny.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    batch = tiny.processor(text=[prompt], images=[[picture(40, 40, 1)]], return_tensors="pt")
    visual = [tiny.model.config.image_token_id]
    assert find_question(tiny.processor, batch["input_ids"][0], visual)[0] == QUESTION


def test_without_a_template_special_tokens_are_left_out():
    tiny = build("paligemma")
    batch = tiny.inputs([[("image", picture(40, 40, 1)), QUESTION]])
    assert QUESTION in find_question(tiny.processor, batch["input_ids"][0], [tiny.model.config.image_token_id])[0]


@pytest.fixture(scope="module")
def seen():
    """A query-aware method that remembers the queries it was given."""
    from dataclasses import dataclass

    queries = []

    @register_method("remembers_queries", paper="a test", query_aware=True)
    @dataclass(frozen=True)
    class Remembers(ConnectorMethod):
        def select(self, tokens, keep):
            query = tokens.question()
            queries.append(query)
            return Selection(top(tokens.features.float() @ query.embeddings.float().mean(0), keep))

    yield queries
    from tokprune import registry

    registry._methods.pop("remembers_queries")


@torch.no_grad()
def test_ways_to_give_the_question(seen):
    tiny = build("llava")
    inputs = tiny.inputs(
        [["about ", ("image", picture(40, 40, 1)), " one"], ["and ", ("image", picture(40, 60, 2)), " the other"]]
    )
    with tokprune.apply(tiny.model, "remembers_queries", ratio=0.2, query="what?", processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        assert [q.text for q in seen] == ["what?", "what?"]
        assert seen[0].embeddings.shape == (5, 64)  # one row per byte of the question
        seen.clear()
        with pruning.query(["first?", "second?"]):
            tiny.model(**inputs)
        assert [q.text for q in seen] == ["first?", "second?"]
        assert {s.question for s in pruning.report().streams} == {"first?", "second?"}
        seen.clear()
        with pruning.query(["first?", "second?"]):  # beams repeat prompts, not questions
            tiny.model.generate(**inputs, max_new_tokens=2, num_beams=2)
        assert [q.text for q in seen] == ["first?", "second?"]
        with pruning.query(["one", "two", "three"]), pytest.raises(MissingQueryError, match="3 questions"):
            tiny.model(**inputs)
    seen.clear()


@torch.no_grad()
def test_without_a_question_the_error_says_what_to_add(seen):
    tiny = build("llava")
    inputs = tiny.inputs([["about ", ("image", picture(40, 40, 1)), " one"]])
    with tokprune.apply(tiny.model, "remembers_queries", ratio=0.2), pytest.raises(MissingQueryError, match="query="):
        tiny.model(**inputs)
    before = tiny.model(**inputs).logits
    assert torch.equal(before, tiny.model(**inputs).logits)


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "video_llama_3", "glm4v"])
@pytest.mark.parametrize("before", ["", "At 12:30 sharp, "])
def test_labels_of_video_frames_are_no_part_of_the_question(family: str, before: str) -> None:
    """A question is the same with a clip as it is with words alone, whatever the processor writes between frames."""
    tiny = build(family)
    asked = "2 dogs: what colour has the car?"
    ids = tiny.chat([[before, ("video", clip(4, seed=1)), asked]])["input_ids"][0]
    config = tiny.model.config
    visual = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    assert find_question(tiny.processor, ids, [i for i in visual if i is not None])[0] == f"{before}{asked}"
