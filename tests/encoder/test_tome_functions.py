"""ToMe's arithmetic against the published functions."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.bipartite import sources, unmerge
from tokprune.methods.encoder.tome import kth_matching, merge_schedule, random_matching
from tokprune.ops.merge import Matching, bipartite_matching, merge, merge_weighted

close = torch.testing.assert_close
TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


def compare(case: GoldenCase, matching: Matching, x: torch.Tensor) -> None:
    """The merge modes and the way back that the file has."""
    for mode in ("mean", "sum", "amax"):
        if f"merge_{mode}" in case:
            close(merge(matching, x, mode), case[f"merge_{mode}"], **TOLERANCE)
    if "unmerge" in case:
        close(unmerge(matching, merge(matching, x)), case["unmerge"], **TOLERANCE)
    if "wavg_none_x" in case:
        value, size = merge_weighted(matching, x)
        close(value, case["wavg_none_x"], **TOLERANCE)
        assert torch.equal(size, case["wavg_none_size"])


@claims("tome_bipartite", anchor="metric")
def test_bipartite(case: GoldenCase) -> None:
    r, cls, distilled = case["cfg"].tolist()
    prefix, metric, x = cls + distilled, case["metric"], case["x"]
    matching = bipartite_matching(metric, r, prefix)
    compare(case, matching, x)
    value, size = merge_weighted(matching, x, case["size_in"])
    close(value, case["wavg_x"], **TOLERANCE)
    assert torch.equal(size, case["wavg_size"])
    if "unmerge_of_wavg" in case:
        back = matching
        if distilled:  # the published way back takes rows for even ones, then odd ones; its merge put the prefix first
            order = (matching.rep % 2 * metric.shape[1] + matching.rep).argsort(1).argsort(1)
            back = Matching(matching.rep, order.gather(1, matching.assign))
        close(unmerge(back, value), case["unmerge_of_wavg"], **TOLERANCE)
    source = sources(matching)
    assert torch.equal(source.to(torch.uint8), case["source"])
    if "round2_metric" in case:
        again = bipartite_matching(case["round2_metric"], r, prefix)
        value, size = merge_weighted(again, value, size)
        close(value, case["round2_x"], **TOLERANCE)
        assert torch.equal(size, case["round2_size"])
        assert torch.equal(sources(again, source).to(torch.uint8), case["round2_source"])


@claims("tome_kth_random_schedule", anchor="k")
def test_kth(case: GoldenCase) -> None:
    metric, x, k = case["metric"], case["x"], int(case.number("k"))
    whole = metric.shape[1] // k * k if k > 1 else metric.shape[1]  # the published code drops the rest
    matching = kth_matching(metric[:, :whole], k)
    compare(case, matching, x[:, :whole])
    value, size = merge_weighted(matching, x[:, :whole])
    close(value, case["wavg_x"], **TOLERANCE)
    assert torch.equal(size, case["wavg_size"])


@claims("tome_kth_random_schedule", anchor="perm")
def test_random(case: GoldenCase) -> None:
    compare(case, random_matching(case["metric"], int(case.number("r")), case["perm"]), case["x"])


@claims("tome_kth_random_schedule", anchor="layers")
def test_schedule(case: GoldenCase) -> None:
    r, depth = case["r"].tolist(), int(case.number("layers"))
    number, slope = ([int(n) for n in r], 0.0) if case.number("kind") == 2 else (int(r[0]), r[1] if len(r) > 1 else 0.0)
    assert list(merge_schedule(number, depth, slope, exact=False)) == case["out"].tolist()


@pytest.mark.parametrize("slope", [-1.0, -0.3, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 12, 23])
def test_exact_schedule_loses_nothing(slope: float, depth: int) -> None:
    schedule = merge_schedule(8, depth, slope)
    assert sum(schedule) == 8 * depth
    assert min(schedule) >= 0
    if depth == 12:
        assert (schedule[0] > schedule[-1]) == (slope < 0)


def test_kth_keeps_every_token_somewhere_and_the_prefix_apart() -> None:
    metric = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(0))
    matching = kth_matching(metric, 3, prefix=1)
    assert matching.rep[0].tolist() == [0, 3, 6, 9, 12]
    assert merge_weighted(matching, metric)[1].sum(1).eq(15).all()
    assert (matching.assign[:, 0] == 0).all()
    assert (matching.assign[:, 1:] > 0).all()
