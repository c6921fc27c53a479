"""QueCC's module against its published output, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims, close
from tokprune.errors import OptionError
from tokprune.methods.connector.quecc import QueCC, load_quecc


@claims("quecc", anchor="x_multi")
def test_golden(case: GoldenCase) -> None:
    weights = {key.removeprefix("w."): case[key] for key in GoldenCase(case.path) if key.startswith("w.")}
    with torch.no_grad():
        out = load_quecc(weights)(case["x"], case["x_multi"], case["text"])
    close(out, case["out"])


def test_a_block_sees_its_patches_and_the_question() -> None:
    torch.manual_seed(0)
    module = QueCC(width=8, levels=6, text=5, kernel=2, heads=2)
    x, levels, text = torch.randn(1, 16, 8), torch.randn(1, 16, 6), torch.randn(1, 1, 5)
    base = module(x, levels, text)
    assert base.shape == (1, 4, 8)
    levels[0, 5] += 1  # row 1, column 1: the first block
    moved = module(x, levels, text)
    assert not torch.allclose(moved[0, 0], base[0, 0])
    assert torch.equal(moved[0, 1:], base[0, 1:])
    assert not torch.allclose(module(x, levels, text + torch.randn(1, 1, 5)), moved)


def test_it_learns_to_look_where_the_question_asks() -> None:
    torch.manual_seed(0)
    module, head = QueCC(width=8, levels=5, text=4, kernel=2, heads=2), torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], 1e-2)
    losses = []
    for _ in range(100):
        values, asked = torch.randn(32, 4, 1), torch.randint(4, (32,))
        levels = torch.cat([values, torch.eye(4).expand(32, 4, 4)], -1)
        text = torch.nn.functional.one_hot(asked, 4).float()[:, None]
        answer = values[torch.arange(32), asked, 0]
        loss = (head(module(torch.zeros(32, 4, 8), levels, text))[:, 0, 0] - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.mark.parametrize("patches", [15, 36])
def test_grids_that_blocks_do_not_tile_are_refused(patches: int) -> None:
    module = QueCC(width=8, levels=6, text=5, kernel=4, heads=2)
    with pytest.raises(OptionError, match="no square grid"):
        module(torch.zeros(1, patches, 8), torch.zeros(1, patches, 6), torch.zeros(1, 1, 5))


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(OptionError, match="multiple of heads"):
        QueCC(width=10, levels=6, text=5, heads=4)
