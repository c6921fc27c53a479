"""Pruned embeddings for a server elsewhere: what the LLM would have been given here."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.serving import encode
from tokprune.testing import build, picture


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", "divprune"),
        ("llava", "hired"),
        ("llava", "tome_merge"),
        ("llava_next", "divprune"),  # newlines of lines that lost all their tokens go, too
        ("llava_next", "tome_merge"),
        ("llava_onevision", "random"),
        ("internvl", "divprune"),
    ],
)
def test_embeddings_are_those_that_the_llm_is_given_under_apply(family: str, method: str) -> None:
    tiny = build(family)
    pictures = [picture(60, 40, 1), picture(40, 40, 2)]
    before = tiny.model.model.get_image_features
    found = encode(tiny.model, tiny.processor, pictures, method, budget=9)
    assert tiny.model.model.get_image_features == before
    for image, one in zip(pictures, found, strict=True):
        given: list[torch.Tensor] = []
        inputs = tiny.inputs([[("image", image), "?"]])
        watch = tiny.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs, given=given: given.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        visual = inputs["input_ids"][0] == tiny.model.config.image_token_id
        with torch.no_grad(), tokprune.apply(tiny.model, method, budget=9) as pruning:
            tiny.model(**inputs)
            kept = len(given[0]) - int((~visual).sum())
            assert kept >= pruning.last.streams[0].kept
        watch.remove()
        first = int(visual.nonzero()[0])
        assert one.shape == (kept, given[0].shape[1])
        torch.testing.assert_close(one, given[0][first : first + kept])


def test_what_a_server_cannot_take_is_refused() -> None:
    llava, qwen = build("llava"), build("qwen2_5_vl")
    with pytest.raises(UnsupportedModelError, match="M-RoPE"):
        encode(qwen.model, qwen.processor, [picture()], ratio=0.5)
    with pytest.raises(OptionError, match="reads the question"):
        encode(llava.model, llava.processor, [picture()], "cdpruner", ratio=0.5)
    with tokprune.apply(llava.model, ratio=0.5), pytest.raises(OptionError, match="remove"):
        encode(llava.model, llava.processor, [picture()], ratio=0.5)
