"""Decoder methods against what published code returned."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.golden_vectors import GoldenCase, claims, close
from tests.methods.decoder.layers import Dense, Rows, given
from tests.published.pool import same_in_half
from tokprune.methods.decoder.fitprune import FitPrune, sums
from tokprune.methods.decoder.llavolta import LLaVolta
from tokprune.methods.decoder.mustdrop import dual_filter
from tokprune.methods.decoder.promptdistill import smoothed
from tokprune.methods.decoder.sparsevlm import (
    SparseVLM,
    cluster_plan,
    kept_and_merged,
    rank_count,
    rater_scores,
    raters,
    recycling,
    sparsevlm,
)
from tokprune.methods.decoder.sparsevlm_plus import SparseVLMPlus, looking_heads
from tokprune.ops.topk import top
from tokprune.tokens import Merge


def spliced(hidden: Tensor, start: int, count: int, middle: Tensor) -> Tensor:
    """The sequence with the visual tokens replaced."""
    return torch.cat([hidden[:start], middle, hidden[start + count :]])


def as_stored(means: Tensor, expected: Tensor, at: int, count: int) -> Tensor:
    """`means` with the two at `at` in the stored order: two centres that are nearest to each other are equally good,
    and the published torch.topk promises no order of ties.
    """
    turned = torch.cat([means[:at], means[at : at + 2].flip(0), means[at + 2 :]])
    swapped = count == 2 and (turned - expected).abs().sum() < (means - expected).abs().sum()
    return turned if swapped else means


def mask_of(indices: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool).index_fill(0, indices, True)


@claims("sparsevlm_stage", anchor="hidden_in")
def test_sparsevlm_stage(case: GoldenCase) -> None:
    (hidden,), (rows,) = case["hidden_in"], case["attn_text_rows"]  # published: one prompt at a time
    count = case["v1_keep_mask"].shape[1]
    start, words = len(hidden) - count - rows.shape[1], rows.shape[1]
    found = rater_scores(hidden[start : start + count], hidden[-words:])
    close(found, case["rater_score"][0])
    assert torch.equal(raters(found), case["rater_idx"])

    tokens = given(hidden, start, count, Rows(rows), embeddings=hidden)
    slots, kept = case.number("v1_v_token_num"), int(case["v1_keep_mask"].sum())
    chosen = SparseVLM(compat="published").select(tokens, slots)
    relation = chosen.info["scores"]
    close(relation, case["v1_relation"][0])
    assert torch.equal(mask_of(top(relation, kept), count), case["v1_keep_mask"][0])
    visual, clusters = hidden[tokens.visual], recycling(count - kept)[1]
    assert slots == kept + clusters
    indices, merge = sparsevlm(visual, relation, kept, clusters, "published")
    out = spliced(hidden, start, count, merge.apply(visual, slots))
    close(as_stored(out, case["v1_hidden_out"][0], start + kept, clusters), case["v1_hidden_out"][0])
    assert SparseVLM.positions == "compact"
    assert torch.equal(case["v1_position_ids"][0], torch.arange(len(out)))
    if kept_and_merged(count, slots) == (kept, clusters):  # two splits may fill as many slots; ours has fewer means
        assert torch.equal(chosen.apply(visual), merge.apply(visual, slots))
        ours = SparseVLM().select(tokens, slots)  # the same tokens, means at their centres
        assert torch.equal(ours.indices, indices)
        close(ours.apply(visual).sum(0), chosen.apply(visual).sum(0), within=1e-4)

    tokens = given(hidden, start, count, Rows(rows), embeddings=hidden)
    chosen = SparseVLMPlus().select(tokens, case.number("v2_v_token_num"))
    close(chosen.info["scores"], case["v2_relation"][0])
    assert torch.equal(mask_of(chosen.indices, count), case["v2_keep_mask"][0])
    close(spliced(hidden, start, count, chosen.apply(hidden[tokens.visual])), case["v2_hidden_out"][0])
    places = spliced(tokens.columns[:, None], start, count, tokens.columns[tokens.visual[chosen.indices], None])
    assert torch.equal(places[:, 0], case["v2_position_ids"][0])
    heads = case["heads_in"]
    assert torch.equal(looking_heads(heads, len(case["heads_top14"])), case["heads_top14"].sort().values)


@claims("sparsevlm_cluster_merge", anchor="x")
def test_sparsevlm_clusters(case: GoldenCase) -> None:
    found = [key for key in case if re.fullmatch(r"merged(_noise)?_c\d+", key)]
    assert found
    for row, x in enumerate(case["x"]):
        for key in found:
            clusters = int(key.rsplit("c", 1)[1])
            centres, into = cluster_plan(x, clusters)
            assert torch.equal(into[centres], torch.arange(clusters))
            scale = 1 / (torch.bincount(into, minlength=clusters).float() + 1e-6)
            merged = Merge(target=into, scale=scale[into]).apply(x, clusters)
            close(as_stored(merged, case[key][row], 0, clusters), case[key][row])


@claims("sparsevlm_v1_rank", anchor="attn_text_to_visual")
def test_sparsevlm_rank(case: GoldenCase) -> None:
    (heads,) = case["attn_text_to_visual"]
    attention = heads.mean(0)
    close(attention.mean(0), case["relation"][0])
    assert rank_count(attention, 1, 0) == min(case.number("rank"), attention.shape[1] - 1)
    found = [key for key in case if key.startswith("mask_s")]
    assert found
    for key in found:
        scale, bias = map(float, key.removeprefix("mask_s").split("_b"))
        kept = top(attention.mean(0), rank_count(attention, scale, bias))
        assert torch.equal(mask_of(kept, attention.shape[1]), case[key][0])


@claims("mustdrop_dual_filter", anchor="attn_text_to_visual")
def test_mustdrop_filter(case: GoldenCase) -> None:
    (heads,) = case["attn_text_to_visual"]
    attention = heads.mean(0)
    keys, unions = case["key_set"], []
    for key in case:
        if key.startswith("keep_g"):
            overall, single = map(float, key.removeprefix("keep_g").split("_i"))
            stays = dual_filter(attention, overall, single) >= 1
            assert torch.equal(stays.nonzero()[:, 0], case[key])
            unions.append((stays | mask_of(keys, len(stays))).nonzero()[:, 0])
    union = case["union_with_keyset"]
    assert any(torch.equal(union, found) for found in unions)
    assert torch.equal(torch.searchsorted(union, keys.sort().values), case["new_keyset"].sort().values)


@claims("fitprune", anchor="attn_visual_rows")
def test_fitprune(case: GoldenCase) -> None:
    (visual,), (text,) = case["attn_visual_rows"], case["attn_text_rows"]
    n, words = visual.shape[1], text.shape[1]
    rows = torch.nn.functional.pad(text, (0, words))
    tokens = given(torch.zeros(n + words, 4), 0, n, Rows(rows, torch.nn.functional.pad(visual, (0, words))))
    cross, own = sums(tokens)
    close(cross, case["cross"])
    close(own, case["self"])
    found = [key for key in case if key.startswith("deleted_")]
    assert found
    for key in found:
        gone = int(key.removeprefix("deleted_"))
        stays = FitPrune().select(tokens, n - gone).indices
        assert set(range(n)) - set(stays.tolist()) == set(case[key].tolist())


@claims("promptdistill", anchor="logits")
def test_promptdistill(case: GoldenCase) -> None:
    pooled = "pool0" not in case.path.stem
    keep = case.number("n_topk")
    for row, logits in enumerate(case["logits"]):
        end = int(case["prompt_ends"][row])
        values = smoothed(logits[:end], 5 if pooled else 1, "published")
        tail = case["attention_mask"][row].nonzero()[:, 0]
        expected = case["keep_idx"][row][case["keep_valid"][row].bool()]
        assert torch.equal(torch.cat([top(values, keep), tail[tail >= end]]), expected)


@claims("llavolta_avgpool", anchor="hidden")
def test_llavolta(case: GoldenCase) -> None:
    start, length = case.number("image_start"), case.number("image_len")
    strides = [int(key.removeprefix("y_s")) for key in case if key.startswith("y_s")]
    assert strides
    for stride in strides:
        used = length // stride * stride  # the published code drops a tail
        for row, hidden in enumerate(case["hidden"]):
            tokens = given(hidden, start, used, Dense(*torch.zeros(3, 1, len(hidden), 2)))
            chosen = LLaVolta().select(tokens, used // stride)
            out = spliced(hidden, start, length, chosen.apply(hidden[tokens.visual]))
            close(out, case[f"y_s{stride}"][row])
            places = spliced(tokens.columns[:, None], start, length, tokens.visual[chosen.indices, None])[:, 0]
            assert same_in_half(places, case[f"pos_s{stride}"][row].long())
