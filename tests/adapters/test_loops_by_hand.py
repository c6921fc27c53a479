"""Decode loops written by hand, interleaved and in threads, on pruned models."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import (
    HYBRID,
    QUICK,
    Prompt,
    apart,
    prompt,
    prompt_of,
    reference,
    slow_unless,
)
from tests.adapters.shortened import NEW, RATIO, TOLERANCE, generate
from tests.spelling import cache_in, with_cache
from tokprune.testing import FAMILIES, picture

# -- loops written by hand ---------------------------------------------------------------------------------------------


def loop(case: Prompt, explicit: bool, steps: int) -> Iterator[Tensor]:
    """Greedy decoding over logical lengths, as a user writes it; yields the last logits of each step."""
    model, mask = case.tiny.model, case.inputs["attention_mask"]
    first = 1 if case.tiny.family == "paligemma" else 0

    def where(mask: Tensor) -> dict[str, Tensor]:
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + first} if explicit else {}

    forward = torch.no_grad()(model.__call__)  # not a with block: it would stay open while the generator rests
    out = forward(**case.inputs, **where(mask), use_cache=True)
    for _ in range(steps):
        yield out.logits[:, -1]
        token = out.logits[:, -1, :256].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        last = {name: value[:, -1:] for name, value in where(mask).items()}
        out = forward(input_ids=token, attention_mask=mask, **with_cache(cache_in(out)), **last)
    assert int(cache_in(out).get_seq_length()) == mask.shape[1], "the cache answers with the prompt's length"
    yield out.logits[:, -1]


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_hand_written_decode_loop(family: str) -> None:
    case = prompt(family)
    tolerance = 1e-3 if family in HYBRID else TOLERANCE  # see checks.py
    ways = [False] if case.forward.mrope else [False, True]
    for explicit in ways:
        native = case.generate if explicit else case.forward
        for positions in ("keep", "compact"):
            with tokprune.apply(case.tiny.model, "random", ratio=RATIO, positions=positions) as pruning:
                logits = torch.stack(list(loop(case, explicit, 4)), 1)
            tokens = logits[..., :256].argmax(-1)[:, :-1]
            answer = reference(case.tiny, native, pruning.last.keep, positions, tokens)
            assert apart(logits[:, 0], [p[-1] for p in answer.prompt]) < tolerance
            assert apart(logits[:, 1:], answer.steps) < tolerance


@pytest.mark.parametrize(
    "family", ["llava_next", "internvl"]
)  # Qwen's rope_deltas live on the model: natively mixed up
def test_interleaved_loops_do_not_mix(family: str) -> None:
    """Two prompts decoded turn by turn on one model: the record of each rides on its own cache."""
    tiny = prompt(family).tiny
    a, b = prompt(family), prompt_of(tiny, [["Short ", ("image", picture(40, 60, 5)), " one, and another text?"]])
    with tokprune.apply(tiny.model, "random", ratio=RATIO):
        alone = [list(loop(case, False, 4)) for case in (a, b)]
        together = list(zip(loop(a, False, 4), loop(b, False, 4), strict=True))
    for i in range(2):
        assert all(torch.equal(x, pair[i]) for x, pair in zip(alone[i], together, strict=True))


@pytest.mark.parametrize("method", ["random", "hired"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_threads_share_one_pruned_model(family: str, method: str) -> None:
    case = prompt(family)
    other = prompt_of(case.tiny, [["Short ", ("image", picture(40, 60, 5)), " one, and another text?"]])
    with tokprune.apply(case.tiny.model, method, ratio=RATIO):
        wanted = [generate(c, c.inputs, {})[0] for c in (case, other)]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(case.tiny.model.generate, **c.inputs, max_new_tokens=NEW) for c in (case, other) * 3]
            done = [job.result() for job in jobs]
    for i, tokens in enumerate(done):
        assert torch.equal(tokens[:, -NEW:], wanted[i % 2])
