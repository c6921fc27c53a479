"""Bipartite soft matching against the published code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden_vectors import GoldenCase, claims
from tests.published.bipartite import sources, unmerge
from tokprune.ops.merge import (
    bipartite_matching,
    cap,
    join,
    join_nearest,
    merge,
    merge_dropped,
    merge_weighted,
    merged_selection,
)
from tokprune.tokens import Merge, Selection, weighted_sums

UNMERGE = "with a distillation token the published inverse mixes up the rows"


@claims("tome_bipartite", anchor="metric", unused={"unmerge_of_wavg": UNMERGE})
def test_golden(case: GoldenCase) -> None:
    r, class_token, distill = case["cfg"].tolist()
    prefix = class_token + distill
    x, size = case["x"], case["size_in"]
    matching = bipartite_matching(case["metric"], r, prefix)
    for mode in ("mean", "sum", "amax"):
        if f"merge_{mode}" in case:
            torch.testing.assert_close(merge(matching, x, mode), case[f"merge_{mode}"], atol=1e-6, rtol=1e-5)
    mean, count = merge_weighted(matching, x)
    torch.testing.assert_close(mean, case["wavg_none_x"], atol=1e-6, rtol=1e-5)
    assert torch.equal(count, case["wavg_none_size"])
    mean, total = merge_weighted(matching, x, size)
    torch.testing.assert_close(mean, case["wavg_x"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(total, case["wavg_size"], atol=1e-5, rtol=1e-6)
    assert torch.equal(sources(matching), case["source"])
    if "unmerge_of_wavg" in case and not distill:  # with a distillation token the published inverse mixes up the rows
        torch.testing.assert_close(unmerge(matching, mean), case["unmerge_of_wavg"], atol=1e-6, rtol=1e-5)
    if "round2_x" in case:
        again = bipartite_matching(case["round2_metric"], r, prefix)
        mean, total = merge_weighted(again, mean, total)
        torch.testing.assert_close(mean, case["round2_x"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(total, case["round2_size"], atol=1e-5, rtol=1e-6)
        assert torch.equal(sources(again, sources(matching)), case["round2_source"])


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 20])
def test_every_count_up_to_the_cap(n: int, prefix: int) -> None:
    metric = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(n))
    for r in range(cap(n, prefix) + 2):
        for ordered in (False, True):
            matching = bipartite_matching(metric, r, prefix, ordered)
            k = n - min(r, cap(n, prefix))
            assert matching.rep.shape == (2, k)
            head = min(prefix, n)
            assert matching.rep[:, :head].tolist() == [list(range(head))] * 2
            for rep, assign in zip(matching.rep.tolist(), matching.assign.tolist(), strict=True):
                assert len(set(rep)) == k
                assert [assign[p] for p in rep] == list(range(k))
                gone = sorted(set(range(n)) - set(rep))
                assert all(p % 2 == 0 and p >= prefix for p in gone)
                assert all(rep[assign[p]] % 2 == 1 and rep[assign[p]] >= prefix for p in gone)
            if ordered:
                assert torch.equal(matching.rep, matching.rep.sort(-1).values)


def test_unmerge_inverts_the_assignment() -> None:
    metric = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    matching = bipartite_matching(metric, 4, 2)
    y = torch.arange(8.0)[None, :, None]
    assert torch.equal(unmerge(matching, y)[0, :, 0].long(), matching.assign[0])


def test_zero_and_equal_tokens() -> None:
    metric = torch.zeros(1, 8, 4)
    matching = bipartite_matching(metric, 3, ordered=True)
    assert matching.rep.tolist() == [[1, 3, 5, 6, 7]]  # ties: the first even ones go, to the first odd one
    assert matching.assign[0, [0, 2, 4]].tolist() == [0, 0, 0]


def test_sizes_stay_whole_in_half_precision() -> None:
    x = torch.ones(1, 4, 2, dtype=torch.bfloat16)
    size = torch.full((1, 4, 1), 257.0)
    mean, total = merge_weighted(bipartite_matching(x, 2), x, size)
    assert mean.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert total.sum() == 4 * 257


def test_tokens_join_the_nearest_target() -> None:
    features = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 7, 12], [0, 3, 19]])
    ours, size = join_nearest(features, targets)
    for b in range(2):
        for i in range(20):
            cosine = [torch.cosine_similarity(features[b, i], features[b, t], dim=0) for t in targets[b]]
            assert ours[b, i] == max(range(3), key=lambda j: cosine[j])
        assert size[b].tolist() == [ours[b].tolist().count(j) for j in range(3)]


def test_a_target_belongs_to_itself_even_beside_its_duplicate() -> None:
    features = torch.ones(1, 4, 3)
    assert join_nearest(features, torch.tensor([[1, 3]]))[0].tolist() == [[0, 0, 0, 1]]
    assert join_nearest(torch.zeros(1, 4, 3), torch.tensor([[1, 3]]))[0].tolist() == [[0, 0, 0, 1]]


def test_weighted_sums_by_hand() -> None:
    g = torch.Generator().manual_seed(3)
    x, scale = torch.randn(3, 11, 5, generator=g), torch.rand(3, 11, generator=g)
    target = torch.randint(-1, 4, (3, 11), generator=g)
    expected = torch.zeros(3, 4, 5)
    for b in range(3):
        for i in range(11):
            if target[b, i] >= 0:
                expected[b, target[b, i]] += x[b, i] * scale[b, i]
    assert torch.equal(weighted_sums(x, target, scale, 4), expected)
    tracked = x.requires_grad_()
    weighted_sums(tracked, target, scale, 4).sum().backward()
    assert tracked.grad is not None
    assert torch.equal(tracked.grad, torch.where(target >= 0, scale, 0)[..., None].expand_as(x))


KINDS = ("indices", "target", "dense rows", "sparse rows", "half rows")


def chosen_of(kind: str, n: int, indices: list[int], seed: int) -> Selection:
    """A selection of n tokens that merges as `kind` says, with one per-token tensor of info; token 0 flows nowhere."""
    g = torch.Generator().manual_seed(seed)
    where, info = torch.tensor(indices), {"scores": torch.rand(n, generator=g)}
    if kind == "indices":
        return Selection(where, info=info)
    target = torch.randint(len(indices), (n,), generator=g).scatter(0, where, torch.arange(len(indices)))
    target[0], scale = -1, torch.rand(n, generator=g) + 0.5
    weights = Merge(target=target, scale=scale)
    if kind != "target":
        rows = weights.dense(len(indices), n)
        weights = Merge(rows={"dense": rows, "sparse": rows.to_sparse(), "half": rows.bfloat16()}[kind.split()[0]])
    return Selection(where, weights, info=info)


def matrix_of(chosen: Selection, n: int) -> Tensor:
    """(K, n) weights, also of a selection that merges nothing."""
    if chosen.weights is not None:
        return chosen.weights.dense(len(chosen), n)
    return torch.nn.functional.one_hot(chosen.indices, n).float()


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_selections_of_parts_join_to_that_of_the_stream(first: str, second: str) -> None:
    """Interleaved parts: every weight is found again at the places in the stream."""
    places = torch.tensor([1, 2, 5, 6, 8]), torch.tensor([0, 3, 4, 7])
    chosen = chosen_of(first, 5, [1, 4], seed=1), chosen_of(second, 4, [2, 3], seed=2)
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))
    joined = join(list(zip(places, chosen, strict=True)), features)
    assert joined.indices.tolist() == [2, 4, 7, 8]
    expected = torch.zeros(4, 9)
    expected[torch.tensor([[0], [3]]), places[0]] = matrix_of(chosen[0], 5)
    expected[torch.tensor([[1], [2]]), places[1]] = matrix_of(chosen[1], 4)
    torch.testing.assert_close(joined.apply(features), expected @ features)
    assert (joined.weights is None) == (first == second == "indices")
    if joined.weights is not None:
        assert torch.equal(joined.weights.dense(4, 9), expected)
        assert (joined.weights.rows is None) == ({first, second} <= {"indices", "target"})
        made = joined.weights.scale if joined.weights.rows is None else joined.weights.rows
        assert made is not None
        assert made.dtype == torch.float32
    scores = torch.empty(9)
    for where, part in zip(places, chosen, strict=True):
        scores[where] = part.info["scores"]
    assert torch.equal(joined.info["scores"], scores)
    assert join(list(zip(places[:1], chosen[:1], strict=True)), features).info == {}  # the parts do not cover it


@pytest.mark.parametrize("kind", KINDS)
def test_what_flows_nowhere_is_averaged_into_the_most_similar_output(kind: str) -> None:
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))
    chosen = chosen_of(kind, 7, [2, 4, 5], seed=6)
    found = merge_dropped(chosen, features)
    rows = matrix_of(chosen, 7)
    out = rows @ features
    dropped = [i for i in range(7) if not rows[:, i].any()]
    assert dropped == ([0, 1, 3, 6] if kind == "indices" else [0])
    for i in dropped:
        nearest = torch.cosine_similarity(out, features[i : i + 1]).argmax()
        rows[nearest, i] = 1
    for k in range(3):
        rows[k] /= 1 + sum(rows[k, i] != 0 for i in dropped)
    assert found.weights is not None
    torch.testing.assert_close(found.weights.dense(3, 7), rows)
    assert found.indices is chosen.indices
    assert found.info is chosen.info


def test_positions_that_flow_to_themselves_are_the_selection() -> None:
    target, weight = torch.tensor([1, 1, -1, 4, 4]), torch.tensor([0.5, 0.5, 0.0, 0.25, 0.75])
    found = merged_selection(target, weight, 2, scores=weight)
    assert found.indices.tolist() == [1, 4]
    assert found.weights is not None
    assert found.weights.dense(2, 5).tolist() == [[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.25, 0.75]]
    assert found.info["scores"] is weight
