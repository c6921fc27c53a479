"""Average pooling: the published means, exact positions, exact budgets."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims, close
from tests.published.pool import average_pool, pooled_positions, same_in_half
from tokprune.errors import OptionError
from tokprune.methods.connector.pool import Pool
from tokprune.tokens import Layout, VisualTokens


def stream(features: torch.Tensor, layout: Layout | None = None) -> VisualTokens:
    return VisualTokens(features, layout or Layout.line(len(features)))


@claims("llavolta", anchor=("features", "hidden"))
def test_golden(case: GoldenCase) -> None:
    if "hidden" in case:  # the same pooling inside the LLM: text before and after stays
        hidden, start, length = case["hidden"], case.number("image_start"), case.number("image_len")
        strides = [int(key[3:]) for key in case if key.startswith("y_s")]
        assert strides
        for stride in strides:
            pooled = average_pool(hidden[:, start : start + length], stride)
            whole = torch.cat([hidden[:, :start], pooled, hidden[:, start + length :]], 1)
            close(whole, case[f"y_s{stride}"])
            places = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
            middle = pooled_positions(places[:, start : start + length], stride)
            expected = torch.cat([places[:, :start], middle, places[:, start + length :]], 1)
            assert same_in_half(expected, case[f"pos_s{stride}"])
        return
    features, stride = case["features"], int(case.number("stride"))
    pooled = average_pool(features, stride)
    torch.testing.assert_close(pooled, case["out_tokens"], atol=1e-5, rtol=1e-5)
    exact, upstream = case["out_positions_exact_floor"], case["out_positions_upstream"]
    assert torch.equal(pooled_positions(case["positions"], stride), exact)
    # The published code takes the mean in float16, whose steps grow with the position: right at first, wrong above
    # 2048.
    step = int(case["positions"].max()) * 2.0**-10
    off = (upstream - exact).abs().max()
    assert off <= step + 1
    assert off == 0 or step > 0.5
    # A budget is a stride: as many windows as the stride form has, on the tokens that it does not drop.
    used = features[0, : exact.shape[-1] * stride]
    ours = Pool().select(stream(used), exact.shape[-1])
    torch.testing.assert_close(ours.apply(used), case["out_tokens"][0], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.indices, pooled_positions(torch.arange(len(used)), stride))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("keep", [1, 2, 5, 23, 24])
def test_every_token_counts_once_and_windows_are_even(dims: int, keep: int) -> None:
    features = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    chosen = Pool(dims=dims).select(stream(features, Layout.grid(4, 6)), keep)  # type: ignore[arg-type]
    assert chosen.weights is not None
    rows = chosen.weights.dense(keep, 24)
    assert (rows > 0).sum(0).tolist() == [1] * 24
    sizes = (rows > 0).sum(1)
    assert int(sizes.max() - sizes.min()) <= 1
    torch.testing.assert_close(rows.sum(1), torch.ones(keep))
    assert all(rows[slot, index] > 0 for slot, index in enumerate(chosen.indices.tolist()))


def test_two_dimensional_cells_are_the_squares_of_the_grid() -> None:
    features = torch.arange(16.0)[:, None]
    chosen = Pool(dims=2).select(stream(features, Layout.grid(4, 4)), 4)
    squares = torch.nn.functional.avg_pool2d(features.reshape(1, 1, 4, 4), 2).flatten()
    assert torch.equal(chosen.apply(features)[:, 0], squares)


@pytest.mark.parametrize("dims", [1, 2])
def test_windows_never_straddle_tiles_or_frames(dims: int) -> None:
    layout = Layout.grid(3, 3, 4, "video")
    for keep in range(1, 37):
        chosen = Pool(dims=dims).select(stream(torch.ones(36, 1), layout), keep)  # type: ignore[arg-type]
        assert chosen.weights is not None
        assert chosen.weights.target is not None
        for slot in range(keep):
            groups = layout.group[chosen.weights.target == slot]
            assert groups.numel()
            assert groups.unique().tolist() == [int(layout.group[chosen.indices[slot]])]


def test_gradients_flow_through_the_means() -> None:
    features = torch.randn(9, 2, requires_grad=True)
    Pool().select(stream(features), 3).apply(features).sum().backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad, torch.full((9, 2), 1 / 3))


def test_other_dims_are_refused() -> None:
    with pytest.raises(OptionError, match="dims=3"):
        Pool(dims=3)  # type: ignore[arg-type]
