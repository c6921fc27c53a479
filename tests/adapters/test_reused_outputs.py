"""Encoder outputs made once and used for several questions: every use keeps what the same picture keeps with its
pixels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.conversations import encode, flat
from tests.adapters.reference import QUICK, shared
from tokprune.errors import MissingSignalError
from tokprune.methods.base import ConnectorMethod, top
from tokprune.registry import register_method
from tokprune.runtime.streams import _first_copies
from tokprune.testing import picture
from tokprune.tokens import Selection

PICTURES = [picture(60, 40, 1), picture(60, 40, 2)]
TEXTS = ["What is this?", "Another question, is it?"]
REUSING = (*QUICK, "llava_onevision", "idefics3", "gemma3", "qwen3_5")


@pytest.fixture(autouse=True)
def asking() -> Any:
    """A method that reads the question and a signal of the tower."""
    from tokprune import registry

    @register_method("asks_and_looks", paper="a test", query_aware=True)
    @dataclass(frozen=True)
    class Asks(ConnectorMethod):
        needs = ("received_attention:-1",)

        def select(self, tokens, keep):
            word = tokens.question().embeddings.float().mean(0)
            scores = torch.tanh(tokens.features.float() @ word) + 100 * tokens.signal("received_attention:-1").float()
            return Selection(top(scores, keep))

    yield
    registry._methods.pop("asks_and_looks")


def kept(model: Any, pruning: Any, **call: Any) -> Tensor:
    with torch.no_grad():
        model(**call)
    return pruning.last.keep


def without_pixels(inputs: Any) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if "pixel" not in k}


@pytest.mark.parametrize("family", REUSING)
def test_one_output_for_many_questions(family: str) -> None:
    """The same object and a copy of it, questions one by one and in a batch, rows in another order."""
    tiny = shared(family)
    model = tiny.model
    alone = [[tiny.inputs([[("image", p), f" {t}"]]) for t in TEXTS] for p in PICTURES]
    with tokprune.apply(model, "asks_and_looks", ratio=0.3, processor=tiny.processor) as pruning:
        wanted = [[kept(model, pruning, **inputs) for inputs in row] for row in alone]
        assert not torch.equal(wanted[0][0][:, : wanted[0][1].shape[1]], wanted[0][1][:, : wanted[0][0].shape[1]])
        for picture_number in range(2):
            once = encode(tiny, alone[picture_number][0])
            before = (once.tokprune_record, [f.clone() for f in once.pooler_output])
            for again in (once, copy.copy(once), once):
                for t in range(2):
                    inputs = alone[picture_number][t]
                    got = kept(model, pruning, **without_pixels(inputs), mm_encoder_outputs={"image": again})
                    assert torch.equal(got, wanted[picture_number][t])
                    assert all(s.sources for s in pruning.last.streams)
            assert once.tokprune_record is before[0]
            assert all(torch.equal(a, b) for a, b in zip(once.pooler_output, before[1], strict=True))


@pytest.mark.parametrize("family", QUICK)
def test_rows_in_another_order(family: str) -> None:
    """Two pictures encoded in one go; then swapped, used once, used twice with different questions."""
    tiny = shared(family)
    model = tiny.model
    both = tiny.inputs([[("image", p), f" {TEXTS[0]}"] for p in PICTURES])
    width = len(encode(tiny, both).pooler_output) // 2  # items of a picture
    for order in ([1, 0], [1], [0, 0], [0, 1, 0, 1], [1, 1, 0]):
        prompts = [[("image", PICTURES[i]), f" {TEXTS[n % 2]}"] for n, i in enumerate(order)]
        inputs = tiny.inputs(prompts)
        with tokprune.apply(model, "asks_and_looks", ratio=0.3, processor=tiny.processor) as pruning:
            wanted = kept(model, pruning, **inputs)
            output = encode(tiny, both)
            items = [i * width + k for i in order for k in range(width)]

            def pick(features: Any, items: list[int] = items) -> Any:
                return features[items] if isinstance(features, Tensor) else [features[i] for i in items]

            output.pooler_output = pick(output.pooler_output)
            if getattr(output, "deepstack_features", None) is not None:
                output.deepstack_features = [
                    pick(p) if not isinstance(p, Tensor) or p.ndim > 2 else torch.cat(pick(list(p.chunk(2))))
                    for p in output.deepstack_features
                ]
            got = kept(model, pruning, **without_pixels(inputs), mm_encoder_outputs={"image": output})
        assert torch.equal(got, wanted)


def test_features_of_another_picture_get_no_signals() -> None:
    tiny = shared("llava")
    inputs = tiny.inputs([[("image", PICTURES[0]), " What?"]])
    with tokprune.apply(tiny.model, "hired", ratio=0.3):
        output = encode(tiny, inputs)
        output.pooler_output = [torch.randn_like(f) for f in output.pooler_output]
        with pytest.raises(MissingSignalError, match="not those"):
            tiny.model(**without_pixels(inputs), mm_encoder_outputs={"image": output})
    with tokprune.apply(tiny.model, "divprune", ratio=0.3) as pruning:
        output = encode(tiny, inputs)
        output.pooler_output = [f.flip(0) for f in output.pooler_output]
        got = kept(tiny.model, pruning, **without_pixels(inputs), mm_encoder_outputs={"image": output})
        assert int(got.sum()) < got.numel()
        assert "geometry" in pruning.last.streams[0].note


@pytest.mark.parametrize("family", QUICK)
def test_beams_still_choose_once(family: str) -> None:
    tiny = shared(family)
    inputs = tiny.inputs([[("image", p), f" {TEXTS[0]}"] for p in PICTURES])
    with tokprune.apply(tiny.model, "asks_and_looks", ratio=0.3, processor=tiny.processor) as pruning:
        wanted = kept(tiny.model, pruning, **inputs)
        tiny.model.generate(**inputs, max_new_tokens=2, num_beams=3)
        assert torch.equal(pruning.last.keep, wanted.repeat_interleave(3, 0))
        tiny.model.generate(**inputs, max_new_tokens=2, num_beams=3, use_cache=False)
        assert torch.equal(pruning.last.keep[:, : wanted.shape[1]], wanted.repeat_interleave(3, 0))


def test_flat_is_what_the_placeholders_get() -> None:
    tiny = shared("llava")
    inputs = tiny.inputs([[("image", PICTURES[0]), " What?"]])
    marks = int((inputs["input_ids"] == tiny.model.config.image_token_id).sum())
    assert len(flat(encode(tiny, inputs).pooler_output)) == marks


@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_pixels_beside_their_own_outputs_are_refused(family: str, ratio: float) -> None:
    """As natively: nothing says which of the two is meant."""
    tiny = shared(family)
    inputs = tiny.inputs([[("image", PICTURES[0]), " What?"]])
    output = {"image": encode(tiny, tiny.inputs([[("image", PICTURES[1]), " What?"]]))}
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        tiny.model(**inputs, mm_encoder_outputs=dict(output))
    with tokprune.apply(tiny.model, "divprune", ratio=ratio), pytest.raises(ValueError, match="mm_encoder_outputs"):
        tiny.model(**inputs, mm_encoder_outputs=dict(output))


@pytest.mark.parametrize(
    ("sizes", "source", "first"),
    [
        ([4, 4, 0, 0], [0, 0, 1, 1], [0]),  # the last prompt is of words alone, its place filled up
        ([0, 0, 4, 4], [0, 0, 1, 1], [0, 0, 1]),
        ([4, 4], [0, 0], [0]),
    ],
)
def test_empty_items_behind_the_last_picture_belong_to_no_prompt(
    sizes: list[int], source: list[int], first: list[int]
) -> None:
    output = SimpleNamespace(pooler_output=[torch.zeros(n, 2) for n in sizes])
    assert _first_copies(source, output, sizes, 2) == first
