"""TextMonkey's filter against the published choice."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.connector.textmonkey import TextMonkey, uniqueness
from tokprune.tokens import Layout, VisualTokens


@claims("textmonkey", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features, keep = case["features"], case.number("r")
    for x, kept, out in zip(features, case["kept_sorted"], case["out_tokens"], strict=True):
        selection = TextMonkey().select(VisualTokens(x, Layout.line(len(x))), keep)
        assert torch.equal(selection.indices, kept)
        assert torch.equal(selection.apply(x), out)


def test_of_equal_tokens_the_last_stays() -> None:
    features = torch.eye(3)[torch.tensor([0, 1, 0, 2, 0, 1])]
    assert TextMonkey().select(VisualTokens(features, Layout.line(6)), 3).indices.tolist() == [3, 4, 5]


def test_streams_of_a_batch_do_not_meet() -> None:
    features = torch.eye(3)[torch.tensor([[0, 0, 1, 2], [2, 1, 2, 2]])]
    assert uniqueness(features).tolist() == [[0, 1, 1, 3], [0, 1, 0, 3]]


def test_last_token_always_stays() -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniqueness(opposite).argmax() == 1
    assert TextMonkey().select(VisualTokens(opposite, Layout.line(2)), 1).indices.tolist() == [1]
