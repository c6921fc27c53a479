"""FastKV by hand: what the prompt's last tokens look at, and where tokens stop being propagated."""

from __future__ import annotations

import torch

from tests.methods.decoder.layers import Rows
from tokprune.methods.cache.fastkv import FastKV, observed


def test_neighbours_share_what_the_last_words_pay() -> None:
    rows = torch.zeros(2, 3, 8)
    rows[0, 1, 1:5] = torch.tensor([4.0, 0.0, 2.0, 0.0])
    rows[0, 2, 1:5] = torch.tensor([0.0, 2.0, 2.0, 4.0])  # mean of both: 2, 1, 2, 2
    rows[1, 0, 1:5] = 9.0  # in front of the window of two
    found = observed(Rows(rows), torch.arange(1, 5), 8, 2, 3)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([[1.5, 5 / 3, 5 / 3, 2.0], [0.0] * 4]))


def test_the_layer_of_propagation_follows_the_depth() -> None:
    for depth, layer in ((32, 16), (8, 4), (2, 1), (1, 1)):
        method = FastKV().propagation(depth)
        assert method is not None
        assert method.plan(depth, None).steps == ((layer, 0.2),)
