"""The baseline `resize` where questions are asked: smaller pictures, tokens counted, refused where no size matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tokprune.demo
from tests.adapters.reference import shared
from tokprune.errors import OptionError
from tokprune.evaluation.cells import Cell, SweepSettings, build_methods, plan
from tokprune.evaluation.lmms_engine import Engine, Smaller
from tokprune.evaluation.lmms_requests import Prompt, TaskRow
from tokprune.loading import Loaded
from tokprune.testing import picture


def chat(*parts: Any) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "words"},
        {"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]},
    ]


def test_pictures_of_a_chat_get_smaller_and_the_chat_stays() -> None:
    smaller = Smaller(shared("qwen2_5_vl").processor, 0.3)
    given = chat({"type": "image", "image": picture(160, 120, 1)}, {"type": "image", "image": picture(90, 90, 2)})
    made, total = smaller(given)
    images = [part["image"] for part in made[1]["content"][:2]]
    assert sum(map(smaller.count, images)) == pytest.approx(0.3 * total, rel=0.35)
    assert given[1]["content"][0]["image"].size == (160, 120)
    assert made[0] == given[0]
    assert made[1]["content"][2] == given[1]["content"][2]
    with pytest.raises(OptionError, match="fewer frames"):
        smaller(chat({"type": "video", "video": np.zeros((2, 8, 8, 3), np.uint8)}))


def test_the_engine_counts_what_a_smaller_picture_saves() -> None:
    tiny = shared("qwen2_5_vl")
    engine = Engine(Loaded(tiny.model, tiny.processor))
    ask = Prompt(TaskRow("t", "test", 0), chat({"type": "image", "image": picture(160, 120, 1)})[1:], "what?", "image")
    (plain,) = engine.generate([ask], 2)
    engine.prune(None, smaller=0.3)
    (small,) = engine.generate([ask], 2)
    saved = plain.record.kept_tokens - small.record.kept_tokens
    assert small.record.total_tokens == plain.record.total_tokens
    assert saved > 0.5 * plain.record.kept_tokens
    assert plain.record.prompt_tokens - small.record.prompt_tokens == saved
    engine.prune(None)
    assert engine.generate([ask], 2)[0].record.kept_tokens == plain.record.kept_tokens


def test_the_demo_model_has_no_smaller_picture() -> None:
    engine = Engine(Loaded(*tokprune.demo.load(), embedded=True))
    engine.prune(None, smaller=0.5)
    example = tokprune.demo.held_out(1)[0]
    words = [{"type": "image", "image": example.image}, {"type": "text", "text": example.question}]
    ask = Prompt(TaskRow("t", "test", 0), [{"role": "user", "content": words}], example.question, "image")
    with pytest.raises(OptionError, match="256 visual tokens of a picture of any size"):
        engine.generate([ask], 2)


def test_a_sweep_has_cells_for_it_beside_methods() -> None:
    assert plan(["t"], ["none", "resize", "divprune"], [0.5]) == (
        Cell("t", "none", 1.0),
        Cell("t", "resize", 0.5),
        Cell("t", "divprune", 0.5),
    )
    assert build_methods("resize", SweepSettings("demo")) == ()
