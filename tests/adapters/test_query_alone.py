"""What a question needs beside its words: a tokenizer, found beside the model or asked for; and a second VLM that
judges frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.frames_methods import lit
from tests.adapters.reference import shared
from tokprune.adapters.local_processor import local_processor
from tokprune.adapters.prompting import build_inputs
from tokprune.errors import MissingQueryError, MissingSignalError, OptionError
from tokprune.registry import get_method, list_methods, method_class
from tokprune.testing import picture

QUERY_AWARE = [n for n in list_methods(query_aware=True) if method_class(n).stage in ("connector", "frames")]


def built(name: str) -> Any:
    return get_method(name, **({"method": "divprune"} if method_class(name).info.wrapper else {}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model that was loaded from a folder which holds its processor, too."""
    tiny, folder = shared("qwen2_5_vl"), tmp_path_factory.mktemp("saved")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    model = type(tiny.model).from_pretrained(folder).eval()
    yield model
    tokprune.remove(model)


def inputs_for(model: Any, name: str) -> Any:
    processor = shared("qwen2_5_vl").processor
    if method_class(name).stage == "frames":
        return build_inputs(model, processor, "What is bright?", videos=[lit([40, 200, 90, 10])])
    return build_inputs(model, processor, "What is bright?", images=[picture(56, 84)])


@pytest.mark.parametrize("name", QUERY_AWARE)
def test_the_words_alone_do_where_the_processor_lies_beside_the_weights(saved: Any, name: str) -> None:
    inputs = inputs_for(saved, name)
    with torch.no_grad(), tokprune.apply(saved, built(name), ratio=0.5, query="What colour is the car?") as pruning:
        saved(**inputs)
    assert pruning.processor is not None
    assert "What colour is the car?" in str(pruning.report())


@pytest.mark.parametrize("name", QUERY_AWARE)
def test_without_a_tokenizer_the_error_asks_for_the_processor(name: str) -> None:
    model = shared("qwen2_5_vl").model
    assert local_processor(model) is None
    inputs = inputs_for(model, name)
    pruning = tokprune.apply(model, built(name), ratio=0.5, query="What colour is the car?")
    with torch.no_grad(), pruning, pytest.raises(MissingQueryError, match=r"processor=processor"):
        model(**inputs)


def test_a_folder_without_a_processor_gives_none(tmp_path: Path) -> None:
    tiny = shared("qwen2_5_vl")
    tiny.model.save_pretrained(tmp_path)
    assert local_processor(type(tiny.model).from_pretrained(tmp_path)) is None


def test_a_second_vlm_judges_the_frames() -> None:
    """Its verdicts are those of its own forwards on the frames' pictures, among yes and no or the whole vocabulary."""
    tiny, small = shared("qwen2_5_vl"), shared("llava_onevision")
    levels = [40, 200, 90, 10]
    inputs = build_inputs(tiny.model, tiny.processor, "What is bright?", videos=[lit(levels)])
    found = {}
    for normalize in ("pair", "vocab"):
        method = get_method("quota", score="self", normalize=normalize)
        with (
            torch.no_grad(),
            tokprune.apply(
                tiny.model,
                method,
                ratio=0.5,
                query="What is bright?",
                processor=tiny.processor,
                scorer=(small.model, small.processor),
            ) as pruning,
        ):
            tiny.model(**inputs)
            (stream,) = pruning.last.streams  # type: ignore[union-attr]
        found[normalize] = stream.selection.info["frame_worth"]
        assert f"P(yes) by the scorer {type(small.model).__name__}" in str(pruning.report())
    assert len(found["pair"]) == 2, "two frames share their tokens here"
    assert (found["vocab"] < found["pair"]).all()
    assert not torch.equal(found["pair"][:1], found["pair"][1:])


def test_the_papers_settings_are_one_word_away() -> None:
    method = get_method("quota", preset="paper")
    assert (method.score, method.normalize, method.decouple) == ("self", "vocab", True)  # type: ignore[attr-defined]


def test_what_a_second_vlm_is_refused_for() -> None:
    tiny, small = shared("qwen2_5_vl"), shared("llava_onevision")
    with pytest.raises(OptionError, match="pair"):
        tokprune.apply(tiny.model, "quota", ratio=0.5, scorer=(small.model,))
    with pytest.raises(OptionError, match="scorer's processor"):
        tokprune.apply(tiny.model, "quota", ratio=0.5, scorer=(small.model, None))
    inputs = build_inputs(tiny.model, tiny.processor, "What is bright?", videos=[lit([40, 200])])
    own = {"query": "What is bright?", "processor": tiny.processor}
    itself, other = (tiny.model, tiny.processor), (small.model, small.processor)
    pruning = tokprune.apply(tiny.model, "quota", ratio=0.5, score="self", scorer=itself, **own)  # type: ignore[arg-type]
    with torch.no_grad(), pruning, pytest.raises(OptionError, match="the model that is pruned"):
        tiny.model(**inputs)
    pruning = tokprune.apply(tiny.model, "quota", ratio=0.5, score="clip", scorer=other, **own)  # type: ignore[arg-type]
    with torch.no_grad(), pruning, pytest.raises(MissingSignalError, match="VlmScorer has no embed_picture"):
        tiny.model(**inputs)
