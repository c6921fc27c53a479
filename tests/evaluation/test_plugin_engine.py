"""Answers, likelihoods and measurements of one model with its pruning, on the demo VLM; no lmms-eval needed."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import tokprune.demo
from tokprune.budget import kept
from tokprune.evaluation.lmms_engine import Engine
from tokprune.evaluation.lmms_options import pruning_config
from tokprune.evaluation.lmms_requests import Prompt, TaskRow
from tokprune.loading import Loaded
from tools.demo.evaluation import answer

EXAMPLES = tokprune.demo.held_out(8, seed=3)
COLORS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "cyan")


@cache
def loaded() -> Loaded:
    return Loaded(*tokprune.demo.load(), embedded=True)


def prompt(i: int, target: str | None = None, picture: bool = True, **generation: Any) -> Prompt:
    example = EXAMPLES[i]
    parts: list[dict[str, Any]] = [{"type": "image", "image": example.image}] if picture else []
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": example.question}]}]
    return Prompt(TaskRow("t", "test", i), chat, example.question, "image" if picture else "text", generation, target)


@pytest.fixture
def engine() -> Any:
    made = Engine(loaded())
    yield made
    made.prune(None)


def test_the_baseline_is_the_model_itself(engine: Engine) -> None:
    said = [a.text for a in engine.generate([prompt(i) for i in range(8)], 3)]
    direct = answer(loaded().model, loaded().processor, [e.question for e in EXAMPLES], [e.image for e in EXAMPLES])
    assert said == direct
    assert sum(w == e.answer for w, e in zip(said, EXAMPLES, strict=True)) >= 5  # it can see
    assert not hasattr(loaded().model, "_tokprune")


def test_tokens_are_counted_where_the_llm_gets_them(engine: Engine) -> None:
    (whole,) = engine.generate([prompt(0)], 3)
    assert (whole.record.total_tokens, whole.record.kept_tokens) == (256, 256)
    engine.prune(pruning_config("divprune", ratio=0.1))
    pruned = engine.generate([prompt(i) for i in range(3)], 3)
    assert [a.record.kept_tokens for a in pruned] == [kept(256, 0.1)] * 3
    assert pruned[0].record.prompt_tokens == whole.record.prompt_tokens - 256 + kept(256, 0.1)
    assert pruned[0].record.new_tokens == 2  # a word and the end
    blind = engine.generate([prompt(0, picture=False)], 3)[0].record
    assert (blind.total_tokens, blind.kept_tokens) == (0, 0)


def test_times_and_flops_are_measured(engine: Engine) -> None:
    record = engine.generate([prompt(0)], 3)[0].record
    assert record.ttft_ms is not None
    assert record.prefill_ms is not None
    assert record.total_ms is not None
    assert 0 < record.prefill_ms < record.ttft_ms <= record.total_ms
    assert record.flops is None
    full = engine.count_flops(prompt(0), record).flops
    engine.prune(pruning_config("divprune", ratio=0.1))
    pruned = engine.count_flops(prompt(0), record).flops
    assert full is not None
    assert pruned is not None
    assert pruned < 0.8 * full
    assert engine.notes == []


@pytest.mark.parametrize("method", ["none", "divprune"])
def test_the_likeliest_option_is_the_generated_answer(engine: Engine, method: str) -> None:
    engine.prune(pruning_config(method, ratio=0.25))
    asked = [i for i, e in enumerate(EXAMPLES) if e.type == "color"]
    assert asked
    for i in asked:
        said = engine.generate([prompt(i)], 3)[0].text
        scored = {c: engine.score(prompt(i, target=c)) for c in COLORS}
        assert min(scored, key=lambda c: scored[c][0]) == said
        assert [c for c in COLORS if scored[c][1]] == [said]
        assert scored[said][2].kept_tokens == (256 if method == "none" else 64)


def test_a_loss_is_the_mean_over_the_tokens_of_the_target(engine: Engine) -> None:
    one = [engine.score(prompt(0, target=c))[0] for c in ("red", "red blue")]
    inputs = engine.processor(
        text=[engine.processor.apply_chat_template(prompt(0).chat, add_generation_prompt=True) + " red blue"],
        images=[EXAMPLES[0].image],
        return_tensors="pt",
    )
    with torch.no_grad():
        likely = engine.model(**inputs).logits[0, -3:-1].log_softmax(-1)
    losses = -likely.gather(1, inputs["input_ids"][0, -2:, None])[:, 0]
    assert one[0] == pytest.approx(float(losses[0]), rel=1e-4)
    assert one[1] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_query_aware_methods_get_each_rows_own_question(engine: Engine) -> None:
    scorer = tokprune.demo.load_scorer()
    engine.prune(pruning_config("cdpruner", ratio=0.1), scorer)
    engine.generate([prompt(i) for i in range(4)], 3)
    streams = engine.pruning.last.streams
    assert [s.question for s in streams] == [e.question for e in EXAMPLES[:4]]


def test_options_without_a_meaning_are_noted_once(engine: Engine) -> None:
    engine.generate([prompt(0, image_aspect_ratio="pad")], 3)
    engine.generate([prompt(1, image_aspect_ratio="pad")], 3)
    assert len(engine.notes) == 1
    assert "image_aspect_ratio" in engine.notes[0]
