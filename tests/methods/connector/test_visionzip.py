"""VisionZip against the published token sets, and what the corrected merge does."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.visionzip import visionzip, visionzip_canvas
from tokprune.methods.connector.visionzip import VisionZip, visionzip_plan
from tokprune.tokens import Layout, VisualTokens


@claims("visionzip", anchor="out_tokens")
def test_golden(case: GoldenCase) -> None:
    expected = case["out_tokens"]
    if "tile_tokens" in case:  # reassembly of a tiled image
        across, down = case["grid_wh"].tolist()
        out = visionzip_canvas(case["tile_tokens"], case["kept_idx"], (across, down))
        assert torch.equal(out, expected)
        return
    rows, hidden, metric = case["cls_attn"], case["hidden_states"], case["metric"]
    dominant, contextual = case.number("dominant_total"), case.number("contextual")
    out, kept = visionzip(rows, hidden, metric, dominant, contextual)
    assert torch.equal(kept, case["kept_idx_topk_order"])
    assert torch.equal(kept.sort().values, case["kept_idx_sorted"])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    # The same through the method with an identity for a projector: everything but [CLS], by position.
    tiles, n = rows.shape[0], rows.shape[-1]
    keep = dominant - 1 + contextual
    method = VisionZip(contextual_share=contextual / keep, compat="published")
    signals = {"cls_attention": rows.sum(1).flatten(), "keys:-2": metric[:, 1:].flatten(0, 1)[:, None]}
    layout = Layout.grid(1, n, groups=tiles, kind="tiles" if tiles > 1 else "image")
    tokens = VisualTokens(hidden[:, 1:].flatten(0, 1), layout, signals)
    selection = method.select(tokens, tiles * keep)
    ours = selection.apply(tokens.features).unflatten(0, (tiles, keep))
    assert torch.equal(torch.bincount(layout.group[selection.indices]), torch.full((tiles,), keep))
    nearest = torch.cdist(expected[:, 1:], ours, compute_mode="donot_use_mm_for_euclid_dist").min(-1)
    assert nearest.values.max() < 1e-4
    assert all(len(set(places)) == keep for places in nearest.indices.tolist())


def stream(n: int, seed: int = 0) -> VisualTokens:
    g = torch.Generator().manual_seed(seed)
    signals = {
        "cls_attention": torch.rand(n, generator=g),
        "keys:-2": torch.randn(n, 4, 8, generator=g),
    }
    return VisualTokens(torch.randn(n, 6, generator=g), Layout.grid(1, n), signals)


def test_published_splits_of_the_budget() -> None:
    tokens = stream(576)
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        merge = VisionZip().select(tokens, keep).weights
        assert merge is not None
        assert merge.target is not None
        # Every token flows somewhere, and the dominant ones alone keep to themselves.
        assert merge.target.min() >= 0
        sizes = torch.bincount(merge.target, minlength=keep)
        assert int(sizes.sum()) == 576
        assert int((sizes > 1).sum()) <= contextual
        best = tokens.signals["cls_attention"].topk(keep - contextual).indices
        assert torch.isin(best, VisionZip().select(tokens, keep).indices).all()
        assert (sizes[merge.target[best]] == 1).all()


def test_corrected_rows_add_up_to_one_and_published_ones_to_two() -> None:
    tokens = stream(100)
    for compat, total in (("corrected", 1.0), ("published", 2.0)):
        selection = VisionZip(contextual_share=0.3, compat=compat).select(tokens, 20)  # type: ignore[arg-type]
        assert selection.weights is not None
        rows = selection.weights.dense(20, 100)
        merged = (rows > 0).sum(-1) > 1
        assert merged.any()
        torch.testing.assert_close(rows[merged].sum(-1), torch.full((int(merged.sum()),), total))
        torch.testing.assert_close(rows[~merged].sum(-1), torch.ones(int((~merged).sum())))
        # A slot's own token is always part of it.
        assert (rows[torch.arange(20), selection.indices] > 0).all()


def test_context_tokens_follow_the_keys() -> None:
    attention = torch.tensor([[9.0, 8.0, 1.0, 1.0, 1.0, 1.0]])
    keys = torch.tensor([[[0.0, 1], [1, 0], [1, 0], [0, 1], [0.1, 1], [1, 0.1]]])
    best, targets, into, weight = visionzip_plan(attention, keys, 2, 2)
    assert best.tolist() == [[0, 1]]
    assert targets.tolist() == [[2, 4]]  # of the rest 2, 3, 4, 5 every second one
    assert into.tolist() == [[0, 1, 2, 4, 4, 2]]
    assert weight.tolist() == [[1, 1, 0.5, 0.5, 0.5, 0.5]]


def test_no_context_tokens_is_no_division_by_zero() -> None:
    tokens = stream(30)
    selection = VisionZip(contextual_share=0).select(tokens, 7)
    assert selection.indices.tolist() == tokens.signals["cls_attention"].topk(7).indices.sort().values.tolist()
    assert torch.equal(selection.apply(tokens.features), tokens.features[selection.indices])
