"""What frames are scored by: the question's sentence, the things that the model names, and a scorer before any
model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.frames_methods import Brightness, ByScore, Watch, lit, scores_of
from tests.adapters.reference import shared
from tokprune.adapters.base import get_adapter
from tokprune.adapters.prompting import build_inputs
from tokprune.errors import MissingSignalError
from tokprune.runtime.frames import decouple, scores
from tokprune.runtime.frames.asking import Asking
from tokprune.runtime.frames.decouple import text_answer
from tokprune.runtime.frames.scores import question_sentence
from tokprune.testing import build, clip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("What colour is the car?", "What colour is the car?"),
        ("What colour is the car?\nA. red\nB. blue\nAnswer with the letter.", "What colour is the car?"),
        ("Select the best answer.\nWho wins? (A) Ann (B) Bob", "Who wins?"),
        ("Describe the scene.", "Describe the scene."),
        ("Name the animal. A. cat B. dog", "Name the animal."),
        ("A man walks in. What does he hold?", "A man walks in. What does he hold?"),
    ],
)
def test_the_question_without_options_and_instructions(text: str, wanted: str) -> None:
    assert question_sentence(text) == wanted


@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_vl", "qwen3_5", "internvl"])
def test_a_text_answer_is_what_generate_says(family: str) -> None:
    tiny = shared(family)
    inputs = build_inputs(tiny.model, tiny.processor, "name things")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = tiny.model.generate(**inputs, max_new_tokens=6, suppress_tokens=None)
    wanted = tiny.processor.tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
    with tokprune.apply(tiny.model, "random", ratio=0.5):
        assert text_answer(get_adapter(tiny.model), tiny.processor, "name things", 6) == wanted


def test_decoupling_takes_what_the_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, scorer = shared("llava_next_video"), Brightness()
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[lit([10, 128, 250])])
    monkeypatch.setattr(scores, "decoupled", lambda adapter, processor, text: (("bright sun",), "entities named"))
    _, report = scores_of(tiny, inputs, ByScore(decouple=True), scorer=scorer)
    assert scorer.texts[-1] == "a photo of bright sun"
    assert "entities named" in str(report)
    monkeypatch.setattr(scores, "decoupled", lambda adapter, processor, text: ((), "decoupling named no entities"))
    _, report = scores_of(tiny, inputs, ByScore(decouple=True), scorer=scorer)
    assert scorer.texts[-1] == "bright?"
    assert "named no entities; question: bright?" in str(report)


def test_letters_of_another_tokenizer_are_refused() -> None:
    tiny = build("llava_next_video")
    inputs = build_inputs(tiny.model, tiny.processor, "q", videos=[clip(4)])

    class NoLetters:
        unk_token_id = 0

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0]

    asking = Asking(SimpleNamespace(model=tiny.model), SimpleNamespace(tokenizer=NoLetters()), "m")  # type: ignore[arg-type]
    with pytest.raises(MissingSignalError, match="does not know as one token"):
        asking.letters("A")
    assert inputs is not None


def test_what_the_model_says_is_read_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def answer(adapter: Any, processor: Any, words: str, most: int) -> str:
        said.append(words)
        return 'The things are ["red car", "dog"]' if len(said) == 1 else "I cannot say."

    monkeypatch.setattr(decouple, "text_answer", answer)
    adapter: Any = SimpleNamespace()
    assert decouple.decoupled(adapter, object(), "Who?") == (
        ("red car", "dog"),
        "entities named by the model: red car, dog",
    )
    assert "Who?" in said[0]
    assert decouple.decoupled(adapter, object(), "Who?")[0] == ()
    with pytest.raises(MissingSignalError, match="processor=processor"):
        decouple.decoupled(adapter, None, "Who?")


def test_the_tiny_model_decouples_without_an_accident() -> None:
    """A random model says nonsense: the question serves, the report says so, and the answer is that of the pruned
    model."""
    tiny = shared("qwen2_vl")
    inputs = build_inputs(tiny.model, tiny.processor, "bright?", videos=[clip(4, seed=1)])
    (scores,), report = scores_of(tiny, inputs, ByScore(source="self", decouple=True))
    assert torch.isfinite(scores).all()
    assert "decoupling named no entities; question: bright?" in str(report)


def test_frames_are_compared_before_any_model_sees_them() -> None:
    from tokprune.errors import OptionError
    from tokprune.runtime.frames.relevance import embed_frames, frame_relevance

    scorer = Watch()
    frames = lit([10, 250, 120])
    with pytest.raises(OptionError, match="how its pixels are normalised"):
        embed_frames(frames, scorer)
    scorer.mean, scorer.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # type: ignore[attr-defined]
    features = embed_frames(frames, scorer)
    wanted = (torch.from_numpy(frames).float() / 255 - 0.5) / 0.25
    assert torch.allclose(torch.cat(scorer.seen), wanted.permute(0, 3, 1, 2), atol=1e-5)
    near = frame_relevance(features, "which is bright?\nA. one B. two", scorer)
    assert scorer.texts == ["which is bright?"]
    assert near.argsort().tolist() == [0, 2, 1]
    both = frame_relevance(features, ["bright", "dark"], scorer)
    assert both.argmin() == 2, "the nearest of several texts counts"
