"""Recoverable Compression: the published outliers, the exact count and what flows into the free slots."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.attention import cls_row
from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.connector.recoverable import Recoverable, recoverable
from tokprune.tokens import Layout, Query, VisualTokens


@claims("recoverable", anchor="hidden_states")
def test_golden(case: GoldenCase) -> None:
    """The tokens that stand out, visually and by the question. The merged tail of the published code reads wrong
    keys."""
    attention = cls_row(case["q"], case["k"], 1)[0, 0]
    torch.testing.assert_close(attention, case["cls_attn"][0], atol=1e-6, rtol=1e-4)
    visual, text = recoverable(case["cls_attn"][0], case["text_similarity"][0])
    assert set(visual.nonzero()[:, 0].tolist()) == set(case["kept_visual"].flatten().tolist())
    assert set(text.nonzero()[:, 0].tolist()) == set(case["kept_text"].flatten().tolist())
    main = (visual | text).nonzero()[:, 0]
    assert torch.equal(main, case["kept_main_sorted"][0])
    assert case["out_tokens"].shape[1] == case.number("num_out")
    torch.testing.assert_close(case["hidden_states"][0, 1:][main], case["out_tokens"][0, : len(main)])


def stream(n: int = 120, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator)
    logits[::13] += 4
    features = torch.randn(n, 12, generator=generator)
    words = torch.randn(2, 12, generator=generator)
    features[5::17] += 2 * words.mean(0)
    signals = {
        "cls_attention_1head:-1": logits.softmax(0),
        "keys:-1": torch.randn(n, 2, 4, generator=generator),
    }
    return VisualTokens(features, Layout.line(n), signals, Query("red car", words))


def test_outliers_are_kept_untouched_and_others_take_up_their_neighbours() -> None:
    tokens = stream()
    selection = Recoverable().select(tokens, 60)
    visual, text = selection.info["visual"], selection.info["text"]
    assert visual.any()
    assert text.any()
    assert not (visual & text).any()
    main = (visual | text)[selection.indices]
    assert 0 < main.sum() < 60
    assert (visual | text).sum() == main.sum(), "an outlier was lost though there was room"
    weights = selection.weights.dense(60, 120)  # type: ignore[union-attr]
    torch.testing.assert_close(weights.sum(1), torch.ones(60))
    assert torch.equal((weights[main] > 0).sum(1), torch.ones(int(main.sum()), dtype=torch.long))
    merged = weights[~main]
    assert ((merged > 0).sum(1) == 1 + 32).all()
    kept = torch.zeros(120, dtype=torch.bool).index_fill(0, selection.indices, True)
    own = torch.zeros_like(weights).scatter(1, selection.indices[:, None], 1.0) > 0
    assert not (weights[:, kept] * ~own[:, kept]).any(), "a kept token flowed into another one"
    a = tokens.signal("cls_attention_1head:-1")
    row = merged[0]
    torch.testing.assert_close(row[row > 0], a[row > 0] / a[row > 0].sum())


def test_free_slots_go_to_the_most_attended() -> None:
    tokens = stream()
    selection = Recoverable().select(tokens, 60)
    main = selection.info["visual"] | selection.info["text"]
    a = tokens.signal("cls_attention_1head:-1").masked_fill(main, -1)
    expected = torch.cat([main.nonzero()[:, 0], a.topk(60 - int(main.sum())).indices]).sort().values
    assert torch.equal(selection.indices, expected)


def test_too_many_outliers_are_cut_in_proportion() -> None:
    tokens = stream()
    everything = Recoverable().select(tokens, 60).info
    counts = [int(everything[k].sum()) for k in ("visual", "text")]
    keep = sum(counts) - 3
    cut = Recoverable().select(tokens, keep).info
    found = [int(cut[k].sum()) for k in ("visual", "text")]
    assert sum(found) == keep
    for now, before in zip(found, counts, strict=True):
        assert abs(now - before * keep / sum(counts)) <= 1
    for key in ("visual", "text"):
        assert not (cut[key] & ~everything[key]).any()


def test_published_counts_low_outliers_too_and_adds() -> None:
    attention = torch.linspace(0.01, 0.011, 100)
    attention[3], attention[50] = 1e-5, 0.5
    calm = torch.linspace(0, 1, 100)
    assert recoverable(attention, calm)[0].sum() == 2
    assert recoverable(attention, calm, high_only=True)[0].tolist() == [i == 50 for i in range(100)]
    tokens = stream()
    rows = Recoverable(compat="published").select(tokens, 60).weights.dense(60, 120)  # type: ignore[union-attr]
    assert rows.max() == 1
    assert (rows.sum(1) > 1).any()


def test_relevance_in_clips_space() -> None:
    tokens = stream()
    clip = torch.randn(120, 5, generator=torch.Generator().manual_seed(3))
    question = Query(clip=clip[11])
    signals = {**tokens.signals, "clip_image": clip}
    method = Recoverable(relevance="clip")
    assert method.needs == ("cls_attention_1head:-1", "keys:-1", "clip_image", "clip_text")
    selection = method.select(VisualTokens(tokens.features, tokens.layout, signals, question), 60)
    assert len(selection) == 60


def test_refusals() -> None:
    tokens = stream()
    with pytest.raises(MissingQueryError):
        Recoverable().select(VisualTokens(tokens.features, tokens.layout, tokens.signals), 3)
    with pytest.raises(OptionError, match="neighbours"):
        Recoverable(neighbours=0)
