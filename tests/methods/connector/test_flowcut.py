"""FlowCut's connector form: the score written out, and its running mean."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.methods.base import top
from tokprune.methods.connector.flowcut import FlowCut, flowcut_scores
from tokprune.runtime.signal_blocks import block_index
from tokprune.runtime.signals import mean_value_norm
from tokprune.tokens import Layout, VisualTokens


def test_the_score_written_out() -> None:
    attention = torch.tensor([[0.2, 0.6], [0.1, 0.1]])
    likeness = torch.tensor([[0.5, 0.5], [0.3, 0.1]])
    norm = torch.tensor([[2.0, 1.0], [4.0, 8.0]])
    first = torch.tensor([(0.25 + 0.5) * 2, (0.75 + 0.5) * 1])
    second = torch.tensor([(0.5 + 0.75) * 4, (0.5 + 0.25) * 8])
    torch.testing.assert_close(flowcut_scores(attention, likeness, norm), (first + second) / 2)
    torch.testing.assert_close(flowcut_scores(attention, likeness, norm, momentum=0.0), second)
    torch.testing.assert_close(flowcut_scores(attention[:1], likeness[:1], norm[:1]), first)


def test_older_blocks_fade() -> None:
    ones = torch.ones(4, 3)
    norm = torch.zeros(4, 3)
    for block in range(4):
        late = norm.clone()
        late[block, 0] = 1.0
        share = flowcut_scores(ones, ones, late)[0] / (2 / 3)
        torch.testing.assert_close(share, torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 2])[block])


def test_default_blocks_are_every_one_up_to_21() -> None:
    assert [block_index(b, 24) for b in FlowCut().blocks] == list(range(22))
    assert len(FlowCut().needs) == 66
    assert FlowCut(blocks=("0.478",)).needs == ("cls_attention:0.478", "value_attention:0.478", "value_norm:0.478")


def test_heads_are_averaged_before_the_norm() -> None:
    """Two heads that point apart: the head-mean vanishes, the sum of norms would not."""
    values = torch.tensor([[[1.0, -2.0], [1.0, 2.0]], [[-1.0, 2.0], [3.0, 0.0]]])  # (H, S, d)
    torch.testing.assert_close(mean_value_norm(values), torch.tensor([0.0, 3.0]))


@claims("flowcut", anchor="cumulative_scores")
def test_golden(case: GoldenCase) -> None:
    """The published score, accumulated over every block of an unpruned tower, and its best tokens."""
    attention, likeness, values = case["attention"], case["value_attention"], case["values"]
    keep = case.number("keep")
    scores = flowcut_scores(attention, likeness, mean_value_norm(values))
    torch.testing.assert_close(scores, case["cumulative_scores"], atol=1e-4, rtol=1e-5)
    assert top(scores, keep).tolist() == case["kept_sorted"].tolist()
    method = FlowCut(blocks=tuple(str(b) for b in range(len(attention))))
    signals = dict(zip(method.needs, (*attention, *likeness, *mean_value_norm(values)), strict=True))
    tokens = VisualTokens(torch.zeros(len(scores), 2), Layout.line(len(scores)), signals)
    assert method.select(tokens, keep).indices.tolist() == case["kept_sorted"].tolist()


def test_frames_are_normalised_on_their_own() -> None:
    method = FlowCut(blocks=("-2",))
    layout = Layout.grid(2, 3, 2, "video")
    attention = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01])
    signals = dict(zip(method.needs, (attention, torch.ones(12), torch.ones(12)), strict=True))
    selection = method.select(VisualTokens(torch.zeros(12, 2), layout, signals), 5)
    assert selection.indices.tolist() == [3, 4, 5, 6, 7]
    torch.testing.assert_close(selection.info["scores"][:6], attention[:6] / 2.1 + 1 / 6)


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="tuple of blocks"):
        FlowCut(blocks=())
    with pytest.raises(OptionError, match="momentum=1"):
        FlowCut(momentum=1.0)
