"""MMTok against the published order, and its handling of words."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.mmtok import mmtok
from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.connector.mmtok import MMTok, content_rows, coverage_rows
from tokprune.registry import get_method
from tokprune.tokens import Layout, Query, VisualTokens


@claims("mmtok", anchor="vision_proj")
def test_golden(case: GoldenCase) -> None:
    settings = (case.number("alpha"), case.number("tv_temp"), case.number("vv_temp"))
    order = mmtok(
        case["vision_proj"],
        case["vision_clip"],
        case["text_embeds"],
        case.number("K"),
        *settings,
        exclude=case["exclude"],
    )
    assert torch.equal(order, case["order"])
    assert torch.equal(order.sort().values, case["kept_sorted"])


@claims("mmtok", anchor="vision_proj", part="the method's choice")
def test_golden_through_select(case: GoldenCase) -> None:
    if len(case["exclude"]):
        pytest.skip("a stream has no padding tokens to exclude")
    x = case["vision_proj"]
    tokens = VisualTokens(
        x, Layout.line(len(x)), {"encoder_features": case["vision_clip"]}, Query(embeddings=case["text_embeds"])
    )
    method = MMTok(*(round(case.number(k), 6) for k in ("alpha", "tv_temp", "vv_temp")))
    assert torch.equal(method.select(tokens, case.number("K")).indices, case["kept_sorted"])


def stream(n: int = 30, words: int = 4, text: str | None = None, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    return VisualTokens(
        torch.randn(n, 12, generator=generator),
        Layout.line(n),
        {"encoder_features": torch.randn(n, 8, generator=generator)},
        Query(text, torch.randn(words, 12, generator=generator)),
    )


def test_each_pick_has_the_largest_gain() -> None:
    tokens = stream(16)
    text = tokens.query.embeddings  # type: ignore[union-attr]
    rows = coverage_rows(tokens.features, tokens.signal("encoder_features"), text).double()  # type: ignore[arg-type]
    best, chosen = torch.zeros(len(rows), dtype=torch.float64), []
    for _ in range(16):
        gain = (rows - best[:, None]).clamp_min(0).sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, rows[:, chosen[-1]])
    found = mmtok(tokens.features, tokens.signal("encoder_features"), text, 16).tolist()  # type: ignore[arg-type]
    assert found[:10] == chosen[:10]
    assert sorted(found) == list(range(16))


def test_excluded_tokens_come_last() -> None:
    tokens = stream(10)
    text = tokens.query.embeddings  # type: ignore[union-attr]
    exclude = torch.tensor([0, 3, 9])
    order = mmtok(tokens.features, tokens.signal("encoder_features"), text, 10, exclude=exclude)  # type: ignore[arg-type]
    assert set(order[-3:].tolist()) == {0, 3, 9}


def test_alone_the_question_decides() -> None:
    tokens = stream(25, words=1)
    near = torch.nn.functional.cosine_similarity(tokens.features, tokens.query.embeddings)  # type: ignore[union-attr, arg-type]
    assert MMTok(alpha=0).select(tokens, 1).indices.tolist() == [int(near.argmax())]


@pytest.mark.parametrize(
    ("text", "count", "rows"),
    [
        ("What colour is the car?", 6, [1, 4]),  # a row for the question mark
        ("What colour is the car?", 5, [1, 4]),
        ("What colour is the car?", 9, list(range(9))),  # sub-words: rows cannot be told apart
        ("What is this?", 3, [2]),
        ("What is it?", 3, [0, 1, 2]),  # nothing else is left
        ("Is it red? Answer the question using a single word or phrase.", 14, [2]),  # what the prompt adds goes, too
        ("A dog? Answer with the option's letter from the given choices directly.", 16, [1]),
        (None, 2, [0, 1]),
    ],
)
def test_stop_words(text: str | None, count: int, rows: list[int]) -> None:
    assert content_rows(Query(text), count) == rows


def test_words_of_several_rows() -> None:
    """A stop word or an added sentence goes with all its rows."""
    pieces = (
        "Which",
        "giraffe",
        "giraffe",
        "is",
        "taller?",
        *["Answer", "the", "question", "using", "a", "single", "word", "or", "phrase."],
    )
    assert content_rows(Query(None, pieces=pieces), len(pieces)) == [1, 2, 4]
    pieces = (
        "Answer",
        "the",
        "question",
        "question",
        "using",
        "a",
        "single",
        "word",
        "or",
        "phrase",
        "phrase",
        ".",
        "Cats",
    )
    assert content_rows(Query(None, pieces=pieces), len(pieces)) == [12]


def test_each_tile_is_covered_on_its_own() -> None:
    one = stream(48, text="red car", words=2)
    layout = Layout.grid(4, 4, 3, "tiles", canvas=(1, 2), thumbnail=True)
    tokens = VisualTokens(one.features, layout, one.signals, one.query)
    x, v, text = one.features, one.signal("encoder_features"), one.query.embeddings  # type: ignore[union-attr]
    parts = [mmtok(x[t : t + 16], v[t : t + 16], text, 5).sort().values + t for t in (0, 16, 32)]  # type: ignore[arg-type]
    assert torch.equal(MMTok().select(tokens, 15).indices, torch.cat(parts))
    assert len(MMTok().select(tokens, 2).indices) == 2


def test_settings_of_the_family() -> None:
    assert get_method("mmtok", preset="qwen2_5_vl") == MMTok(text_temperature=0.01, stop_words=False)
    assert get_method("mmtok", preset="qwen2_5_vl", alpha=1.0).alpha == 1.0  # type: ignore[attr-defined]


def test_stop_words_change_the_choice_only_through_the_rows() -> None:
    tokens = stream(text="what is red car", words=4)
    kept = tokens.query.embeddings[2:]  # type: ignore[union-attr, index]
    plain = VisualTokens(tokens.features, tokens.layout, tokens.signals, Query(None, kept))
    assert torch.equal(MMTok().select(tokens, 7).indices, MMTok().select(plain, 7).indices)


def test_batch_equals_single() -> None:
    batch = [stream(seed=1), stream(seed=2), stream(words=2), stream(n=20)]
    for tokens, selection in zip(batch, MMTok().select_batch(batch, [6] * 4), strict=True):
        assert torch.equal(selection.indices, MMTok().select(tokens, 6).indices)


def test_refusals() -> None:
    tokens = stream()
    with pytest.raises(MissingQueryError):
        MMTok().select(VisualTokens(tokens.features, tokens.layout, tokens.signals), 3)
    with pytest.raises(OptionError, match="text_temperature"):
        MMTok(text_temperature=0)
