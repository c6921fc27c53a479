"""VScan's first stage against the published tokens, and the budget that the published rounding loses."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.vscan import vscan_published
from tokprune.methods.connector.vscan import VScan, vscan_local, window_of
from tokprune.tokens import Layout, VisualTokens


def stream(features: torch.Tensor, shallow: torch.Tensor, deep: torch.Tensor, grid: tuple[int, int]) -> VisualTokens:
    """Tiles (B, N, ...) as one stream."""
    tiles = features.shape[0]
    signals = dict(zip(VScan().needs, (shallow.flatten(), deep.flatten()), strict=True))
    layout = Layout.grid(*grid, groups=tiles, kind="tiles" if tiles > 1 else "image")
    return VisualTokens(features.flatten(0, 1), layout, signals)


@claims("vscan", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features, shallow, deep = case["features"], case["cls_attn_shallow"], case["cls_attn_deep"]
    expected, keep = case["kept_sorted"], case.number("T")
    kept, out = vscan_published(features, shallow, deep, keep)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(out, case["out_tokens"], atol=1e-4, rtol=1e-4)
    tiles, n = shallow.shape
    tokens = stream(features, shallow, deep, (24, 24))
    everywhere = (expected + torch.arange(tiles)[:, None] * n).flatten()
    for compat in ("published", "corrected"):
        selection = VScan(compat=compat).select(tokens, tiles * keep)  # type: ignore[arg-type]
        assert len(selection.indices.unique()) == tiles * keep
        if expected.shape[1] == keep:  # nothing was rounded away: all three agree
            assert torch.equal(selection.indices, everywhere)
            ours = selection.apply(tokens.features).unflatten(0, (tiles, keep))
            torch.testing.assert_close(ours, case["out_tokens"], atol=1e-4, rtol=1e-4)
        elif compat == "published":
            assert torch.isin(everywhere, selection.indices).all()


def test_the_whole_budget_is_spent() -> None:
    g = torch.Generator().manual_seed(0)
    shallow, deep = torch.rand(1, 576, generator=g), torch.rand(1, 576, generator=g)
    features = torch.randn(1, 576, 8, generator=g)
    assert vscan_published(features, shallow, deep, 58)[0].shape[1] == 45
    indices = VScan().select(stream(features, shallow, deep, (24, 24)), 58).indices
    assert len(indices.unique()) == 58
    # Half of it local: with no help from the deep layer, no window has fewer than one or more than two of 29 tokens.
    cell = torch.arange(576)
    window = window_of(cell // 24, cell % 24, (24, 24), 4)
    local = vscan_local(shallow, window, 29)[0]
    per_window = torch.bincount(window[local], minlength=16)
    assert per_window.sum() == 29
    assert set(per_window.tolist()) == {1, 2}
    assert torch.isin(local.nonzero()[:, 0], indices).all()


def test_windows_of_any_grid() -> None:
    cell = torch.arange(5 * 9)
    window = window_of(cell // 9, cell % 9, (5, 9), 4)
    assert window.unique().tolist() == list(range(16))
    assert torch.bincount(window).tolist() == [6, 4, 4, 4, 3, 2, 2, 2, 3, 2, 2, 2, 3, 2, 2, 2]
    tiny = torch.arange(4)
    assert window_of(tiny // 2, tiny % 2, (2, 2), 4).tolist() == [0, 2, 8, 10]


def test_an_incomplete_round_goes_to_the_highest() -> None:
    shallow = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7]])
    window = torch.tensor([0, 0, 1, 1, 2, 2])
    assert vscan_local(shallow, window, 2)[0].tolist() == [False, True, False, True, False, False]
    assert vscan_local(shallow, window, 4)[0].tolist() == [False, True, False, True, True, True]


def test_dropped_tokens_join_the_nearest_kept_one() -> None:
    features = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1], [0.2, 0.9], [0.8, 0.3]]])
    shallow, deep = torch.zeros(1, 5), torch.tensor([[1.0, 0, 1, 0, 0]])
    selection = VScan().select(stream(features, shallow, deep, (1, 5)), 2)
    assert selection.indices.tolist() == [0, 2]
    ours = selection.apply(features[0])
    torch.testing.assert_close(ours, torch.stack([features[0, [0, 1, 4]].mean(0), features[0, [2, 3]].mean(0)]))
