"""GemFilter against the published indices, and its mean over neighbours by hand."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.methods.connector.gemfilter import GemFilter, pooled
from tokprune.tokens import Layout, VisualTokens


@claims("gemfilter", anchor="q_last")
def test_golden(case: GoldenCase) -> None:
    logits = (case["q_last"] @ case["k"].transpose(2, 3)).sum(1)[0, 0]  # (N,) all heads, neither scale nor softmax
    for name, window in (("pool", 5), ("nopool", 1)):
        expected, values = case[f"idx_{name}"][0, 0], case[f"val_{name}"][0, 0]
        method = GemFilter(window=window)
        scaled = logits / 8 / 16**0.5  # as the signal gives it: mean over heads, scaled
        tokens = VisualTokens(torch.zeros(len(logits), 2), Layout.line(len(logits)), {method.needs[0]: scaled})
        assert torch.equal(method.select(tokens, len(expected)).indices, expected.sort().values)
        torch.testing.assert_close(pooled(logits, window)[expected], values, atol=1e-5, rtol=1e-5)


def test_what_lies_outside_counts_as_nothing() -> None:
    values = torch.tensor([5.0, 0.0, 0.0, 10.0])
    assert pooled(values, 3).tolist() == pytest.approx([5 / 3, 5 / 3, 10 / 3, 10 / 3])
    assert torch.equal(pooled(values, 1), values)


def test_the_layer_is_the_published_one_and_windows_are_odd() -> None:
    assert round(GemFilter().layer * 31) == 13
    assert GemFilter(layer=13).needs == ("llm_logits:13",)
    with pytest.raises(OptionError, match="window=4 has no middle"):
        GemFilter(window=4)
