"""Pruned embeddings for a server elsewhere: what the LLM would have been given here."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.serving import encode
from tokprune.testing import build, picture


@pytest.mark.parametrize("method", ["divprune", "hired", "tome_merge"])
def test_embeddings_are_those_that_the_llm_is_given_under_apply(method: str) -> None:
    tiny = build("llava")
    pictures = [picture(60, 40, 1), picture(40, 40, 2)]
    before = tiny.model.model.get_image_features
    found = encode(tiny.model, tiny.processor, pictures, method, budget=9)
    assert tiny.model.model.get_image_features == before
    given: list[torch.Tensor] = []
    for image in pictures:
        inputs = tiny.inputs([[("image", image), "?"]])
        watch = tiny.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        with torch.no_grad(), tokprune.apply(tiny.model, method, budget=9):
            tiny.model(**inputs)
        watch.remove()
    for one, whole in zip(found, given, strict=True):
        assert one.shape == (9, whole.shape[1])
        torch.testing.assert_close(one, whole[1:10])  # between <s> and the question


def test_what_a_server_cannot_take_is_refused() -> None:
    llava, qwen = build("llava"), build("qwen2_5_vl")
    with pytest.raises(UnsupportedModelError, match="M-RoPE"):
        encode(qwen.model, qwen.processor, [picture()], ratio=0.5)
    with pytest.raises(OptionError, match="reads the question"):
        encode(llava.model, llava.processor, [picture()], "cdpruner", ratio=0.5)
    with tokprune.apply(llava.model, ratio=0.5), pytest.raises(OptionError, match="remove"):
        encode(llava.model, llava.processor, [picture()], ratio=0.5)
