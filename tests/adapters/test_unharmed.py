"""A model is unharmed by pruning: bit for bit when all is kept or pruning was removed, after errors, and in what is not
pruned."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.checks import TOLERANCE, check_decision, tolerance
from tests.adapters.pairs import Pairs
from tests.adapters.reference import (
    MAIN,
    QUICK,
    Run,
    apart,
    cases,
    language_model,
    prompt,
    run,
    samples,
    slow_unless,
)
from tests.spelling import with_cache
from tokprune.testing import FAMILIES, build, picture

# -- the model unharmed ------------------------------------------------------------------------------------------------


def traces(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that patching could leave on the modules: instance attributes, hooks, exchanged classes."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            [len(value) for key, value in sorted(module.__dict__.items()) if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }


def same(a: Run, b: Run) -> bool:
    """Whether two runs are equal bit for bit."""
    return torch.equal(a.logits, b.logits) and torch.equal(a.tokens, b.tokens) and torch.equal(a.steps, b.steps)


@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f in QUICK or k == "image", f, k) for f, k in cases(FAMILIES)]
)
def test_keeping_all_and_removing_are_bit_identical(family: str, kind: str) -> None:
    case = prompt(family, kind)
    model = case.tiny.model
    before = traces(model)
    for method in ("random", Pairs()):
        with tokprune.apply(model, method, ratio=1) as pruning:
            assert same(run(case.tiny, case.inputs), case.unpruned)
            assert torch.equal(pruning.last.keep, case.real)
    pruning = tokprune.apply(model, "random", ratio=0.3)
    assert not same(run(case.tiny, case.inputs), case.unpruned)
    pruning.remove()
    assert same(run(case.tiny, case.inputs), case.unpruned)
    assert traces(model) == before
    pruning.remove()
    tokprune.remove(model)
    assert traces(model) == before


def test_applying_twice_replaces() -> None:
    case = prompt("llava_next")
    model = case.tiny.model
    before = traces(model)
    first = tokprune.apply(model, "random", ratio=0.5)
    once = traces(model)
    second = tokprune.apply(model, "random", ratio=0.1)
    assert traces(model) == once, "the first pruning should be gone"
    assert (first.active, second.active) == (False, True)
    model(**case.inputs)
    assert first.last is None
    check_decision(case, second.last, 0.1)
    first.remove()
    assert second.active, "a replaced handle must not take its successor away"
    model(**case.inputs)
    check_decision(case, second.last, 0.1)
    second.remove()
    assert traces(model) == before


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt: nothing that catches Exception sees it."""


PLACES = ("tower", "method", "language model", "decode step")


@contextlib.contextmanager
def failing(model: Any, method: Any, place: str, error: type[BaseException]) -> Iterator[None]:
    """Raise `error` somewhere inside the next forward (in the third forward for "decode step")."""
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if place != "decode step" or calls == 3:
            raise error("on purpose")

    if place == "method":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(method), "scores", fail)
            yield
        return
    base = model.base_model
    tower = base.visual if hasattr(base, "visual") else base.vision_tower
    where = tower if place == "tower" else language_model(model).layers[1]
    hook = where.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [RuntimeError, Interrupt])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_exception_inside_generate_leaves_the_model_clean(family: str, place: str, error: type[BaseException]) -> None:
    from transformers import DynamicCache

    case = prompt(family)
    model = case.tiny.model
    before = traces(model)
    pruning = tokprune.apply(model, "random", ratio=0.2)
    pruned = run(case.tiny, case.inputs)
    during = traces(model)
    cache = DynamicCache(config=model.config.get_text_config())
    held = weakref.ref(cache)
    with failing(model, pruning.config.methods[0], place, error):
        try:
            model.generate(**case.inputs, max_new_tokens=5, **with_cache(cache))
        except error as raised:
            assert str(raised) == "on purpose"  # noqa: PT017 - pytest.raises would keep the frames and the cache alive
        else:
            pytest.fail("nothing was raised")
        del cache
        if place != "decode step":
            with pytest.raises(error, match="on purpose"):
                model(**case.inputs)
    assert traces(model) == during
    assert same(run(case.tiny, case.inputs), pruned)
    gc.collect()
    assert held() is None, "the pruning still holds the cache of the generation that failed"
    pruning.remove()
    assert traces(model) == before
    assert same(run(case.tiny, case.inputs), case.unpruned)


# -- one result, however it is computed --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in MAIN])
def test_eager_and_sdpa_agree(family: str) -> None:
    case = prompt(family)
    eager = build(family, attn="eager")
    for positions in ("keep", "compact"):
        answers = []
        for tiny in (case.tiny, eager):
            with tokprune.apply(tiny.model, "random", ratio=0.2, positions=positions) as pruning:
                answers.append(run(tiny, tiny.inputs(samples("image"))))
            keep = pruning.last.keep
        assert torch.equal(answers[0].tokens, answers[1].tokens)
        assert apart(answers[0].steps, answers[1].steps) < tolerance(family)
        assert apart(answers[0].logits[keep], answers[1].logits[keep]) < tolerance(family)


@pytest.mark.parametrize("family", QUICK)
def test_positions_hidden_from_attention_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention reads gaps in positions as packing, so under it only the rotary embedding sees kept positions."""
    case = prompt(family)
    monkeypatch.setattr("tokprune.runtime.execute.hides_positions", lambda adapter: True)
    text = case.tiny.inputs([["no picture here"]])
    wanted = run(case.tiny, text)
    with tokprune.apply(case.tiny.model, "random", ratio=0.2, positions="keep") as pruning:
        got = run(case.tiny, case.inputs)
        assert same(run(case.tiny, text), wanted), "the kept positions outlive their prompt"
        for error in (RuntimeError, Interrupt):
            with failing(case.tiny.model, None, "language model", error), pytest.raises(error):
                run(case.tiny, case.inputs)
            assert same(run(case.tiny, text), wanted), "the kept positions outlive a prompt that failed"
    assert case.distance(pruning.last.keep, "keep", got) < TOLERANCE


@pytest.mark.parametrize("method", ["random", "divprune"])
@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f in QUICK and k == "image", f, k) for f, k in cases(FAMILIES)]
)
def test_a_row_depends_on_itself_alone(family: str, kind: str, method: str) -> None:
    """Neighbours, batch order and padding side change neither the choice nor the answer."""
    case, parts = prompt(family, kind), samples(kind)
    tiny = case.tiny
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, method, ratio=0.2, positions=positions) as pruning:
            batch, keep = run(tiny, case.inputs), pruning.last.keep
            wanted = [batch.logits[b][keep[b]] for b in range(2)]
            chosen = [keep[b][case.real[b]] for b in range(2)]
            for order, side in (([0], "left"), ([1], "left"), ([1, 0], "left"), ([0, 1], "right"), ([1, 0], "right")):
                inputs = tiny.inputs([parts[b] for b in order], padding_side=side)
                real = inputs["attention_mask"].bool()
                with torch.no_grad():
                    logits, here = tiny.model(**inputs).logits, pruning.last.keep
                for i, b in enumerate(order):
                    assert torch.equal(here[i][real[i]], chosen[b])
                    assert apart([logits[i][here[i]]], [wanted[b]]) < tolerance(family)
                if side == "left":
                    alone = run(tiny, inputs)
                    assert torch.equal(alone.tokens, batch.tokens[order])
                    assert apart(alone.steps, batch.steps[order]) < tolerance(family)


# These cannot take a prompt without picture beside one with, pruned or not.
NEED_PICTURES = ("paligemma", "idefics3", "smolvlm", "llava_onevision", "gemma3")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NEED_PICTURES])
def test_text_only_prompts_are_untouched(family: str) -> None:
    tiny = prompt(family).tiny
    alone = tiny.inputs([["no picture here"]])
    wanted = run(tiny, alone)
    beside = tiny.inputs([["no picture here"], ["one ", ("image", picture(40, 40, 3)), " here"]])
    with tokprune.apply(tiny.model, "random", ratio=0.2) as pruning:
        assert same(run(tiny, alone), wanted)
        assert pruning.last is None
        got = run(tiny, beside)
    length = alone["input_ids"].shape[1]
    assert torch.equal(got.tokens[:1], wanted.tokens)
    assert apart(got.steps[:1], wanted.steps) < tolerance(family)
    assert apart(got.logits[0, -length:], wanted.logits[0]) < tolerance(family)
