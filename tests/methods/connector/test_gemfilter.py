"""GemFilter against the published indices, and its mean over neighbours by hand."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims, close
from tokprune.errors import OptionError
from tokprune.methods.connector.gemfilter import GemFilter, pooled
from tokprune.tokens import Layout, VisualTokens


@claims("gemfilter", anchor="q_last")
def test_golden(case: GoldenCase) -> None:
    queries, keys = case["q_last"], case["k"]  # (B, H, 1, d) and (B, H', N, d)
    heads, width = queries.shape[1], queries.shape[3]
    keys = keys.repeat_interleave(heads // keys.shape[1], 1)
    for row, logits in enumerate((queries @ keys.transpose(2, 3)).sum(1)[:, 0]):  # (N,), neither scale nor softmax
        for name, window in (("pool", 5), ("nopool", 1)):
            expected, values = case[f"idx_{name}"][row, 0], case[f"val_{name}"][row, 0]
            method = GemFilter(window=window)
            scaled = logits / heads / width**0.5  # as the signal gives it: mean over heads, scaled
            tokens = VisualTokens(torch.zeros(len(logits), 2), Layout.line(len(logits)), {method.needs[0]: scaled})
            assert torch.equal(method.select(tokens, len(expected)).indices, expected.sort().values)
            close(pooled(logits, window)[expected], values)


def test_what_lies_outside_counts_as_nothing() -> None:
    values = torch.tensor([5.0, 0.0, 0.0, 10.0])
    assert pooled(values, 3).tolist() == pytest.approx([5 / 3, 5 / 3, 10 / 3, 10 / 3])
    assert torch.equal(pooled(values, 1), values)


def test_the_layer_is_the_published_one_and_windows_are_odd() -> None:
    assert round(GemFilter().layer * 31) == 13
    assert GemFilter(layer=13).needs == ("llm_logits:13",)
    with pytest.raises(OptionError, match="window=4 has no middle"):
        GemFilter(window=4)
