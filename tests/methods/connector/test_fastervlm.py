"""FasterVLM against the published masks, and the split over tiles and frames."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.methods.connector.fastervlm import FasterVLM
from tokprune.tokens import Layout, VisualTokens


@claims("fastervlm", anchor="cls_attn")
def test_golden(case: GoldenCase) -> None:
    rows, expected = case["cls_attn"], case["kept_sorted"]
    tiles, n = rows.shape[0], rows.shape[-1]  # the tiles as one stream with an equal budget each
    assert expected.shape == (tiles, case.number("T"))
    layout = Layout.grid(1, n, groups=tiles, kind="tiles" if tiles > 1 else "image")
    torch.testing.assert_close(rows.mean(1), case["mean_attn"], atol=1e-7, rtol=1e-5)
    scores = rows.mean(1).flatten()
    tokens = VisualTokens(torch.zeros(tiles * n, 2), layout, {"cls_attention": scores})
    chosen = FasterVLM().select(tokens, expected.numel()).indices
    assert torch.equal(chosen, (expected + torch.arange(tiles)[:, None] * n).flatten())


def test_an_odd_budget_goes_to_the_first_tiles_and_around_small_ones() -> None:
    group = torch.tensor([0] * 6 + [1] * 2 + [2] * 6)
    layout = Layout(group, torch.zeros(14, dtype=torch.long), torch.arange(14), ((1, 6), (1, 6), (1, 6)), "tiles")
    tokens = VisualTokens(torch.zeros(14, 2), layout, {"cls_attention": torch.arange(14.0)})
    indices = FasterVLM().select(tokens, 9).indices
    assert torch.bincount(group[indices]).tolist() == [4, 2, 3]
    assert indices.tolist() == [2, 3, 4, 5, 6, 7, 11, 12, 13]


def test_equal_scores_go_to_the_lower_index() -> None:
    tokens = VisualTokens(torch.zeros(10, 2), Layout.grid(1, 5, 2, "tiles"), {"cls_attention": torch.zeros(10)})
    assert FasterVLM().select(tokens, 6).indices.tolist() == [0, 1, 2, 5, 6, 7]
