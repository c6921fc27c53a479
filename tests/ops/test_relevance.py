"""Relevance by attention and gradients: a case worked by hand, and what it has to leave alone."""

from __future__ import annotations

import torch

from tools.explain import attention_relevance


def test_two_layers_of_two_heads_by_hand() -> None:
    # Two tokens; per layer the positive part of attention x gradient, mean over two heads, is
    # layer 0: [[0, 0], [.5 * .4, 0]] (the other head's product is negative) = [[0, 0], [.1, 0]] after the mean,
    # layer 1: [[.3, 0], [.2, .1]].
    maps = [
        torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.9, 0.1]]]]),
        torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.2, 0.8]]]]),
    ]
    gradients = [
        torch.tensor([[[[0.0, 3.0], [0.4, -1.0]], [[-2.0, 5.0], [-0.3, -0.1]]]]),
        torch.tensor([[[[0.2, 7.0], [0.4, 0.4]], [[0.4, 0.0], [1.0, 0.0]]]]),
    ]
    # First R = I + flow0 = [[1, 0], [.1, 1]]; then R + flow1 R:
    # row 0: [1 + .3, 0]; row 1: [.1 + .2 * 1 + .1 * .1, 1 + .1].
    expected = torch.tensor([[[1.3, 0.0], [0.31, 1.1]]])
    torch.testing.assert_close(attention_relevance(maps, gradients), expected)


def test_nothing_flows_where_gradients_are_not_positive() -> None:
    maps = [torch.rand(2, 3, 5, 5).softmax(-1)]
    assert torch.equal(attention_relevance(maps, [-torch.rand(2, 3, 5, 5)]), torch.eye(5).expand(2, 5, 5))


def test_rows_of_a_batch_are_independent() -> None:
    maps, gradients = [torch.rand(3, 2, 4, 4) for _ in range(2)], [torch.randn(3, 2, 4, 4) for _ in range(2)]
    whole = attention_relevance(maps, gradients)
    alone = attention_relevance([m[1:2] for m in maps], [g[1:2] for g in gradients])
    torch.testing.assert_close(whole[1:2], alone)
