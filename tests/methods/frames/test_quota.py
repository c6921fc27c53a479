"""QuoTA against the published allocation and reducers, and the exact allocation against its vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_vectors import GoldenCase, claims
from tests.methods.frames.clips import video
from tokprune.errors import OptionError
from tokprune.methods.connector.divprune import DivPrune
from tokprune.methods.frames.quota import (
    Quota,
    fit_rectangles,
    published_shape,
    published_shares,
    quota_shares,
    rectangular_shares,
    scale_weights,
)
from tokprune.methods.frames.reduce import FrameReducer, rectangle, rectangles
from tokprune.methods.frames_base import PerFrame
from tokprune.tokens import Layout, VisualTokens


@claims("proposal_budget_alloc", anchor="scores")
def test_exact_allocation(case: GoldenCase) -> None:
    budget, cap, power, minimum = case.array("B_cap_p_m").tolist()
    scores, cap = case.array("scores").tolist(), int(cap)
    keep = min(int(budget), cap * len(scores))
    shares = quota_shares(scores, keep, [cap] * len(scores), power, int(minimum))
    assert shares == case["k"].tolist()
    side = math.isqrt(cap)
    area, left = rectangular_shares(shares, [(side, side)] * len(scores))
    golden = case.array("rect_hw").tolist()
    assert area == [h * w for h, w in golden]
    assert left == case.number("rect_left")
    for count, (h, w) in zip(area, golden, strict=True):  # which way a rectangle lies is nobody's rule
        assert count == 0 or rectangle((side, side), count) in ((h, w), (w, h))
    fitted = fit_rectangles(shares, [(side, side)] * len(scores), [cap] * len(scores))
    assert sum(fitted) == keep


def reduced(case: GoldenCase, variant: str, counts: list[int]) -> list[torch.Tensor]:
    """Each surviving frame through our reducer in its published form."""
    features = case["feat"].float()
    side = math.isqrt(features.shape[1])
    layout = Layout.grid(side, side, 1, "video")
    method = FrameReducer(VARIANTS[variant], published=True)
    out = []
    for frame, count in zip(features, counts, strict=True):
        if count:
            chosen = method.select(VisualTokens(frame, layout), count)
            assert len(chosen) == count
            out.append(chosen.apply(frame))
    return out


VARIANTS = {"v1": "bilinear", "v2": "avgpool", "v3": "linspace", "v4": "tome", "v5": "tome_separable"}


@claims("quota", anchor="feat")
def test_published(case: GoldenCase) -> None:
    side, per_frame, frames = case["P_maxtoken_total"].tolist()
    budget, n = per_frame * frames, side * side
    prob = case.array("prob")
    weights = ((100 * prob) ** 2).tolist()
    torch.testing.assert_close(torch.tensor(weights), case["weights"].float())
    counts = published_shares(weights, budget)
    assert counts == case["cur_token"].tolist()
    scaled = scale_weights([w / sum(weights) for w in weights], n / budget)
    assert scaled == pytest.approx(case.array("scaled_weights").tolist(), rel=1e-12)
    for variant in VARIANTS:
        mine = counts if variant == "v1" else published_shares(weights, budget, n)
        shapes = [shape for shape in case[f"{variant}_shapes"].tolist() if shape[0] > 0]
        if variant in ("v1", "v2", "v5"):
            mine_shapes = [list(published_shape(k)) for k in mine if k > 0]
            mine = [h * w for h, w in map(published_shape, mine)]
        else:
            mine_shapes = [[k, 0] for k in mine if k > 0]
        assert mine_shapes == shapes, variant
        theirs = case[f"{variant}_out"].split([k for k in mine if k])
        if max(mine) > n:  # blown up beyond the frame's own tokens, for which there are no slots
            assert variant == "v1"
            theirs = [out for out in theirs if len(out) <= n]
            mine = [k if k <= n else 0 for k in mine]
        for a, b in zip(reduced(case, variant, mine), theirs, strict=True):
            if VARIANTS[variant].startswith("tome"):  # ours stand in raster order
                a, b = (x[x[:, 0].argsort()] for x in (a, b))
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_published_surplus_is_lost_and_ours_is_not() -> None:
    scores = [0.01] * 9 + [0.97] + [0.01] * 2
    weights = [s * s for s in scores]
    assert max(published_shares(weights, 100)) == 99  # of 81: blown up
    capped = published_shares(weights, 100, 81)
    assert (max(capped), sum(capped)) == (81, 81)
    assert published_shares([60, 24, 10, 6], 100, 25) == [
        25,
        25,
        17,
        10,
    ]  # 24 overtakes the cap and feeds those behind it
    ours = quota_shares(scores, 100, [81] * 12)
    assert max(ours) == 81
    assert sum(ours) == 100
    assert scale_weights([0.5, 0.3, 0.2], 0.6) == [0.5, 0.3, 0.2]


def test_published_refuses_what_its_code_raises_for() -> None:
    with pytest.raises(OptionError, match="corrected"):
        published_shares([0.0, 0.0], 10)
    with pytest.raises(OptionError, match="nan"):
        published_shares([1.0, math.nan], 10)
    tokens = video(6, (4, 4), scores=torch.full((6,), 0.5))
    with pytest.raises(OptionError, match="truncates"):
        Quota(score="self", compat="published").allocate(tokens, 5)


def test_published_in_a_stream_under_fills_as_it_does() -> None:
    tokens = video(6, (4, 4), scores=torch.tensor([0.9, 0.1, 0.5, 0.1, 0.1, 0.1]))
    method = Quota(score="self", compat="published", calibrate="none")
    counts = method.allocate(tokens, 40)
    assert counts == [16, 0, 9, 0, 0, 0]  # 29.3 -> 5 x 5, which the frame does not hold; 9.04 -> 3 x 3
    assert not PerFrame(method).exact


scores = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=40)


@given(scores, st.data())
@settings(max_examples=150, deadline=None)
def test_shares_are_exact_for_any_scores(values: list[float], data: st.DataObject) -> None:
    caps = data.draw(st.lists(st.integers(0, 50), min_size=len(values), max_size=len(values)))
    minimum = data.draw(st.integers(0, 60))
    if sum(caps) == 0:
        return
    keep = data.draw(st.integers(1, sum(caps)))
    shares = quota_shares(values, keep, caps, 2.0, minimum)
    assert sum(shares) == keep
    assert all(0 <= k <= c for k, c in zip(shares, caps, strict=True))
    if keep >= sum(min(minimum, c) for c in caps):
        assert all(k >= min(minimum, c) for k, c in zip(shares, caps, strict=True))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20), st.data())
@settings(max_examples=100, deadline=None)
def test_rectangles_keep_the_sum_and_drop_no_frame(grids: list[tuple[int, int]], data: st.DataObject) -> None:
    sizes = [h * w for h, w in grids]
    shares = [data.draw(st.integers(0, n)) for n in sizes]
    minimum = data.draw(st.integers(0, 9))
    fitted = fit_rectangles(shares, grids, sizes, minimum)
    assert sum(fitted) == sum(shares)
    for before, after, n in zip(shares, fitted, sizes, strict=True):
        assert min(minimum, before) <= after <= n
        assert (before == 0) == (after == 0)


def test_rectangles_have_the_form_of_the_grid() -> None:
    for grid in ((27, 27), (9, 16), (5, 4), (1, 6), (3, 11)):
        for h, w in rectangles(*grid):
            assert h <= grid[0]
            assert w <= grid[1]
            assert 0.5 <= (h / w) / (grid[0] / grid[1]) <= 2
        assert rectangles(*grid)[-1] == grid
    assert rectangle((9, 9), 7) is None
    assert rectangle((9, 9), 12) == (4, 3)
    assert rectangle((9, 16), 12) == (3, 4)


def test_the_best_frame_gets_most_and_power_sharpens() -> None:
    tokens = video(6, (6, 6), scores=torch.tensor([0.1, 0.2, 0.9, 0.3, 0.2, 0.1]))
    square = Quota(score="self").allocate(tokens, 40)
    assert max(square) == square[2]
    plain = Quota(score="self", power=1).allocate(tokens, 40)
    assert plain[2] < square[2]
    assert len(set(Quota(score="self", power=0).allocate(tokens, 42))) == 1
    assert min(Quota(score="self", minimum=3).allocate(tokens, 40)) >= 3
    assert Quota(score="self").allocate(tokens, 40)[0] < 3


def test_rectangles_only_where_the_reducer_needs_them() -> None:
    tokens = video(8, (6, 6), seed=4)
    for reducer in ("bilinear", "avgpool", "tome_separable"):
        own = PerFrame(Quota(score="self", reducer=reducer)).select(tokens, 90).info["frame_tokens"].tolist()
        able = sum(k == 0 or rectangle((6, 6), k) is not None for k in own)
        assert able >= 7, own  # what is left over lengthens rows of one frame or two
    exact = Quota(score="self").allocate(tokens, 90)
    inside = PerFrame(Quota(score="self"), DivPrune()).select(tokens, 90).info["frame_tokens"].tolist()
    assert inside == exact
    assert PerFrame(Quota(score="self", reducer="tome")).select(tokens, 90).info["frame_tokens"].tolist() == exact


def test_options_are_checked() -> None:
    for bad in (
        {"reducer": "bilinea"},
        {"power": -1},
        {"minimum": -1},
        {"minimum": 1.5},
        {"score": "vlm"},
        {"calibrate": "max"},
        {"granularity": "video"},
        {"normalize": "all"},
        {"compat": "paper"},
        {"entities": "dog", "score": "clip"},
        {"entities": ("dog",)},
        {"decouple": True},
        {"score": "self", "query_prompt": "is it?"},
    ):
        with pytest.raises(OptionError):
            Quota(**bad)
    assert Quota(score="clip", entities=["dog"]).entities == ("dog",)  # type: ignore[arg-type]
