"""Threads, and models that hold the same vision tower: nobody gets another's pictures, questions or reductions."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokprune
from tokprune.errors import OptionError
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, picture

FAMILIES = ("llava", "internvl", "qwen2_5_vl")
METHODS: dict[str, Callable[[], Any]] = {
    "signal": lambda: "hired",
    "encoder": lambda: "tome",
    "encoder that drops": lambda: "evit",
    "pixels": lambda: "pixelprune",
    "both": lambda: [tokprune.get_method("tome", r=2), "visionzip"],
}


class Dawdle(nn.Module):
    """Gives other threads their turn in the middle of a forward."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def __call__(self, *args: Any) -> None:
        time.sleep(self.random.choice((0, 0, 0.001, 0.003)))


def dawdling(tower: nn.Module) -> None:
    """Every block of a tower waits a moment, now and then."""
    blocks = getattr(getattr(tower, "encoder", tower), "layers", None) or getattr(tower, "blocks", None)
    blocks = blocks if blocks is not None else tower.encoder.layer  # type: ignore[union-attr]
    for index, block in enumerate(blocks):  # type: ignore[arg-type]
        block.register_forward_pre_hook(Dawdle(index))


def tower_of(model: Any) -> Any:
    return model.base_model.visual if hasattr(model.base_model, "visual") else model.base_model.vision_tower


def prompts(tiny: Any, count: int = 4) -> list[Any]:
    """Prompts with pictures of different sizes and numbers."""
    sizes = [(60, 40), (40, 72), (56, 56), (80, 30)]
    out = []
    for i in range(count):
        row: list[Any] = [f"a{'b' * i} "]
        for j in range(1 + i % 2):
            row += [("image", picture(*sizes[(i + j) % 4], seed=10 * i + j)), f" c{j} "]
        out.append(tiny.inputs([row]))
    return out


def together(jobs: list[Callable[[], Tensor]], expected: list[Tensor], rounds: int = 5) -> None:
    """Run every job in a thread of its own, again and again; each must get its own answer."""
    wrong: list[str] = []
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        try:
            start.wait(30)
            for turn in range(rounds):
                with torch.no_grad():
                    got = jobs[i]()
                if got.shape != expected[i].shape or not torch.allclose(got, expected[i], atol=1e-5):
                    wrong.append(f"job {i}, turn {turn}: another answer")
        except Exception as error:  # whatever it is, this thread has failed
            wrong.append(f"job {i}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def job(model: Any, inputs: Any) -> Callable[[], Tensor]:
    return lambda: model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_threads_on_one_model_get_their_own_answers(family: str, method: str) -> None:
    tiny = build(family)
    dawdling(tower_of(tiny.model))
    tokprune.apply(tiny.model, METHODS[method](), ratio=0.3)
    jobs = [job(tiny.model, inputs) for inputs in prompts(tiny)]
    together(jobs, [one() for one in jobs])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("signal", "signal"),
        ("signal", "encoder"),
        ("encoder", None),
        ("signal", None),
        ("both", "encoder"),
        ("pixels", "encoder"),
    ],
)
@torch.no_grad()
def test_models_that_share_a_tower_do_not_meet(family: str, first: str, second: str | None) -> None:
    """Alternately in one thread, and at the same time in several; a model that is not pruned runs its tower plain."""
    one, two = build(family), build(family)
    name = "visual" if hasattr(one.model.base_model, "visual") else "vision_tower"
    setattr(two.model.base_model, name, tower_of(one.model))
    inputs = prompts(one)
    plain = [job(two.model, x)() for x in inputs]
    dawdling(tower_of(one.model))
    ratios = iter((0.3, 0.6))
    expected: dict[int, list[Tensor]] = {1: plain}
    for number, (tiny, method) in enumerate(((one, first), (two, second))):  # each pruned alone
        if method is not None:
            with tokprune.apply(tiny.model, METHODS[method](), ratio=next(ratios)):
                expected[number] = [job(tiny.model, x)() for x in inputs]
    tokprune.apply(one.model, METHODS[first](), ratio=0.3)
    if second is not None:
        tokprune.apply(two.model, METHODS[second](), ratio=0.6)
    for i, x in enumerate(inputs):
        assert torch.allclose(job(one.model, x)(), expected[0][i], atol=1e-5)
        assert torch.allclose(job(two.model, x)(), expected[1][i], atol=1e-5)
    jobs = [job(model, x) for x in inputs[:2] for model in (one.model, two.model)]
    together(jobs, [expected[number][i] for i in range(2) for number in (0, 1)])
    tokprune.remove(one.model)
    tokprune.remove(two.model)
    assert torch.equal(job(two.model, inputs[0])(), plain[0])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_plain_calls_of_the_tower_do_not_disturb_a_pruned_model(method: str) -> None:
    tiny = build("llava")
    tower, pixels = tower_of(tiny.model), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    size = tiny.model.config.vision_config.image_size
    pixels = nn.functional.interpolate(pixels, (size, size))
    plain = tower(pixels).last_hidden_state
    dawdling(tower)
    tokprune.apply(tiny.model, METHODS[method](), ratio=0.3)
    jobs = [job(tiny.model, x) for x in prompts(tiny, 2)]
    answers = [one() for one in jobs]
    together([*jobs, lambda: tower(pixels).last_hidden_state], [*answers, plain])


@torch.no_grad()
def test_generation_in_threads() -> None:
    tiny = build("qwen2_vl")
    dawdling(tower_of(tiny.model))
    tokprune.apply(tiny.model, METHODS["both"](), ratio=0.3)

    def answer(inputs: Any) -> Callable[[], Tensor]:
        return lambda: tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False).float()

    jobs = [answer(x) for x in prompts(tiny)]
    together(jobs, [one() for one in jobs], rounds=3)


@torch.no_grad()
def test_a_question_belongs_to_the_thread_that_asks_it() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    pruning = tokprune.apply(tiny.model, "random", ratio=0.5, query="the question of apply", processor=tiny.processor)
    connector = pruning._installed.connector
    connector.options.method = _Echo()
    questions = ["what is red?", "how many cats are there?", "is it dark?", None]

    def ask(i: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if questions[i] is None:
                tiny.model(**inputs)
                return torch.tensor([len("the question of apply") == _Echo.heard.text_length])
            with pruning.query(questions[i]):
                time.sleep(0.002)
                tiny.model(**inputs)
                return torch.tensor([len(questions[i]) == _Echo.heard.text_length])

        return run

    together([ask(i) for i in range(4)], [torch.tensor([True])] * 4, rounds=6)


class _Heard(threading.local):
    text_length = 0


class _Echo(tokprune.get_method("uniform").__class__):  # type: ignore[misc]
    """Notes the question it was given, thread by thread."""

    heard = _Heard()
    query_aware = True

    def select_batch(self, batch: Any, keeps: Any) -> Any:
        _Echo.heard.text_length = len(batch[0].query.text)
        return super().select_batch(batch, keeps)


@torch.no_grad()
def test_nested_questions_and_questions_after_an_error() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), " b"]])
    with tokprune.apply(tiny.model, "random", ratio=0.5, query="outer", processor=tiny.processor) as pruning:
        pruning._installed.connector.options.method = _Echo()

        def heard() -> int:
            tiny.model(**inputs)
            return _Echo.heard.text_length

        with pruning.query("one"):
            with pytest.raises(RuntimeError, match="mine"):
                fail_inside(pruning, heard)
            assert heard() == len("one")
        assert heard() == len("outer")
    bare = apply_encoder(tiny.model, "tome", ratio=0.5)
    with pytest.raises(OptionError, match="takes no question"), bare.query("what?"):
        pass


def fail_inside(pruning: Any, heard: Callable[[], int]) -> None:
    with pruning.query("one two"):
        assert heard() == len("one two")
        raise RuntimeError("mine")


def test_training_in_threads_on_one_tower() -> None:
    """Gradient checkpointing recomputes the blocks of the right run, whoever else is under way."""
    from tests.encoder.all_towers import TOWERS, pixels

    model = TOWERS["clip"]().train()
    dawdling(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    apply_encoder(model, "tome", r=7)
    xs = [pixels(1 + i, i) for i in range(3)]
    names = [n for n, p in model.named_parameters() if p.requires_grad]

    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = model(x).last_hidden_state.square().mean()
            grads = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names], allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    together([lambda x=x: gradient(x) for x in xs], [gradient(x) for x in xs])  # type: ignore[misc]
