"""crop() of a pruned cache counts tokens as they were written, back over pictures, too; pickled caches come back as
they were."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import HYBRID, QUICK, Prompt, apart, prompt, reference
from tests.spelling import cache_in, with_cache
from tokprune.errors import TokpruneError
from tokprune.testing import FAMILIES

CROPPING = [f for f in FAMILIES if f not in HYBRID and f not in ("paligemma", "molmo2")]


def families(*quick: str) -> list[Any]:
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in CROPPING]


def first(case: Prompt) -> Any:
    return cache_in(case.tiny.model(**case.inputs, use_cache=True))


def follow(case: Prompt, cache: Any, length: int, new: Tensor) -> Tensor:
    """Logits of new text on a cache cropped to `length` columns; positions as they would be had the rest never been."""
    mask = torch.nn.functional.pad(case.inputs["attention_mask"][:, :length], (0, new.shape[1]), value=1)
    where = next_positions(case, length)[:, None] + torch.arange(new.shape[1])
    where = where.expand(3, -1, -1) if case.forward.mrope else where
    return case.tiny.model(input_ids=new, attention_mask=mask, position_ids=where, **with_cache(cache)).logits


def next_positions(case: Prompt, length: int) -> Tensor:
    """(B,) position after the first `length` columns of the unpruned prompt."""
    where = case.forward.positions[..., :length]
    return (where.amax(0) if where.ndim == 3 else where).masked_fill(~case.real[:, :length], -1).amax(1) + 1


@pytest.mark.parametrize("family", families(*QUICK, "gemma3"))
@torch.no_grad()
def test_crop_back_over_a_picture(family: str) -> None:
    """To between the two pictures of the second prompt, where the first prompt still is in its only one or past it."""
    case = prompt(family, "image")
    length = case.real.shape[1]
    visual = case.visual[1].nonzero().flatten()
    gap = int((visual.diff() > 1).nonzero()[-1])  # the last text between pictures
    to = int(visual[gap]) + 2
    new = torch.tensor([[10, 20, 30, 40]] * 2)
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, "random", ratio=0.3, positions=positions) as pruning:
            cache = first(case)
            keep = pruning.last.keep[:, :to]
            whole = copy.deepcopy(cache)
            cache.crop(to - length)
            assert cache.get_seq_length() == to
            got = follow(case, cache, to, new)[1]
            assert cache.get_seq_length() == to + 4
            cache.crop(-4)
            assert cache.get_seq_length() == to
            again = follow(case, cache, to, new)[1]
            whole.crop(-1)  # the last text token alone
            assert whole.get_seq_length() == length - 1
        assert apart([got], [again]) < 1e-5
        # The second prompt by brute force; the first may be cut inside its picture.
        native = copy.copy(case.forward)
        native.real = native.real.clone()
        native.real[:, to:] = False
        kept = torch.nn.functional.pad(keep, (0, length - to))
        wanted = reference(case.tiny, native, kept, positions, new).steps[1]
        assert apart([got], [wanted]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", families("llava", "qwen2_5_vl", "gemma3"))
def test_crop_to_nothing_and_inside_a_picture(family: str) -> None:
    case = prompt(family, "image")
    model, length = case.tiny.model, case.real.shape[1]
    with tokprune.apply(model, "random", ratio=0.3):
        cache = first(case)
        cache.crop(-length)
        assert cache.get_seq_length() == 0
        cache = first(case)
        inside = int(case.visual[1].nonzero()[3])
        cache.crop(inside - length)
        assert cache.get_seq_length() == inside
        follow(case, cache, inside, torch.tensor([[10, 20]] * 2))
        with pytest.raises(ValueError, match="positive"):
            cache.crop(5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pruned_caches_are_pickled(family: str) -> None:
    case = prompt(family, "image")
    new = torch.tensor([[10, 20, 30, 40]] * 2)
    length = case.real.shape[1]
    with tokprune.apply(case.tiny.model, "random", ratio=0.3):
        cache = first(case)
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        twins = [pickle.loads(pickle.dumps(cache)), torch.load(file, weights_only=False)]
        wanted = follow(case, cache, length, new)
        for twin in twins:
            unread = copy.deepcopy(twin)
            assert twin.get_seq_length() == length
            assert torch.equal(follow(case, twin, length, new), wanted)
    with pytest.raises(TokpruneError):
        follow(case, unread, length, new)
