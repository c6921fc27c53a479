"""DART: the published choice inside the LLM, and the exact count of the form in front of it."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.dart import dart_in_llm, picks_per_pivot
from tokprune.errors import OptionError
from tokprune.methods.connector.dart import Dart, least_similar, strongest
from tokprune.tokens import Layout, VisualTokens


@claims("dart_llava", "dart_qwen", anchor="hidden_norm")
def test_golden(case: GoldenCase) -> None:
    hidden, keys = case["hidden_norm"][0], case["keys"][0]
    start, length = case.number("image_start"), case.number("image_len")
    image, text = case.number("pivot_image"), case.number("pivot_text")
    norms = keys.abs().sum((0, 2))
    assert torch.equal(start + strongest(norms[start : start + length], image), case["image_pivots_by_norm"])
    end = start + length
    assert torch.equal(end + strongest(norms[end:], text), case["text_pivots_by_norm"])
    most, reduction = case.number("max_trunc"), round(case.number("reduction_ratio"), 6)
    each = picks_per_pivot(length, image + text, None if reduction < 0 else reduction, None if most < 0 else most)
    assert image + (image + text) * each == len(case["retained_sorted"])
    kept = dart_in_llm(hidden, keys, start, length, each, image, text, case["pivot_visit_order"])
    assert torch.equal(kept, case["retained_sorted"])


@claims("dart_llava", "dart_qwen", anchor="hidden_norm", part="the order of visit")
def test_own_order_of_visit_is_image_then_text_by_norm(case: GoldenCase) -> None:
    hidden, keys = case["hidden_norm"][0], case["keys"][0]
    start, length = case.number("image_start"), case.number("image_len")
    visit = torch.cat([case["image_pivots_by_norm"], case["text_pivots_by_norm"]])
    args = (hidden, keys, start, length, 2, case.number("pivot_image"), case.number("pivot_text"))
    assert torch.equal(dart_in_llm(*args), dart_in_llm(*args, visit))


def test_rule_written_out() -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    norms = x.abs().sum(-1)
    pivots = sorted(range(20), key=lambda i: -norms[i].item())[:4]
    kept, cosine = set(pivots), torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    for pivot, count in zip(pivots, (2, 2, 1, 1), strict=True):  # 10 = 4 pivots + 6
        free = [i for i in range(20) if i not in kept]
        kept |= set(sorted(free, key=lambda i: cosine[pivot, i].item())[:count])
    assert Dart().select(VisualTokens(x, Layout.line(20)), 10).indices.tolist() == sorted(kept)


def test_a_pivot_that_repeats_everywhere_keeps_nothing_twice() -> None:
    x = torch.ones(9, 3)
    for keep in range(1, 10):
        chosen = Dart().select(VisualTokens(x, Layout.line(9)), keep).indices
        assert chosen.tolist() == list(range(keep))


def test_candidates_are_respected() -> None:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    candidates = torch.arange(10) >= 5
    picks = least_similar(x, torch.tensor([0, 1]), [3, 2], candidates)
    assert sorted(picks.tolist()) == [5, 6, 7, 8, 9]


def test_max_tokens_wins() -> None:
    assert picks_per_pivot(576, 8, 0.778) == 15
    assert picks_per_pivot(576, 8, 0.778, 128) == 16


def test_pivots_are_checked() -> None:
    with pytest.raises(OptionError, match="pivots"):
        Dart(pivots=0)
