"""How frames are scored: calibration, words against frames, what is asked of a scorer, and decoupling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.methods.frames.clips import about, video
from tokprune.errors import OptionError
from tokprune.methods.frames.aks import AKS
from tokprune.methods.frames.decouple import MOST, WIDEST, decoupling_prompt, parse_decoupling
from tokprune.methods.frames.questions import CALIBRATIONS, calibrated, content_words, word_relevance
from tokprune.methods.frames.quota import Quota
from tokprune.tokens import Layout


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=20),
    st.sampled_from(CALIBRATIONS),
)
@settings(max_examples=150, deadline=None)
def test_calibrated_scores_are_finite_and_keep_their_order(values: list[float], how: str) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    out = calibrated(scores, how)
    assert torch.isfinite(out).all()
    if how != "none":
        assert ((out >= 0) & (out <= 1)).all()
    known = torch.isfinite(scores)
    order = scores[known].argsort()
    assert (out[known][order].diff() >= -1e-12).all()
    if known.any():
        assert (out[~known] <= out[known].min() + 1e-12).all()


def test_calibrations() -> None:
    cosines = torch.tensor([0.20, 0.25, 0.30])
    torch.testing.assert_close(calibrated(cosines, "minmax"), torch.tensor([0.0, 0.5, 1.0]))
    assert calibrated(torch.full((4,), 0.3), "minmax").tolist() == [1.0] * 4
    logits = torch.tensor([10.0, 10.0 + math.log(2), math.nan])
    torch.testing.assert_close(calibrated(logits, "softmax"), torch.tensor([0.5, 1.0, 0.0]))
    torch.testing.assert_close(calibrated(torch.tensor([0.0, -100.0]), "sigmoid"), torch.tensor([0.5, 0.0]))
    # SigLIP logits of a video without anything that fits: the order decides.
    torch.testing.assert_close(calibrated(torch.tensor([-20.0, -10.0]), "sigmoid"), torch.tensor([0.0, 1.0]))
    assert calibrated(torch.tensor([0.3, math.nan, 0.9]), "none").tolist() == pytest.approx([0.3, 0.0, 0.9])
    with pytest.raises(OptionError, match="minmax"):
        calibrated(cosines, "minmaxx")


def test_a_missing_score_does_not_widen_the_range() -> None:
    torch.testing.assert_close(calibrated(torch.tensor([0.2, math.nan, 0.3]), "minmax"), torch.tensor([0.0, 0.0, 1.0]))


def test_the_frame_that_shows_the_word_scores_best() -> None:
    tokens = video(6, (4, 5), seed=7)
    word = tokens.query.embeddings[4]  # type: ignore[union-attr, index]
    features = tokens.features + 5.0  # an offset that all pictures share
    features[3 * 20 : 3 * 20 + 8] += 4 * word
    tokens = replace(tokens, features=features)
    for granularity in ("frame", "token"):
        worth = Quota(granularity=granularity).frame_worth(tokens)
        assert int(worth.argmax()) == 3, granularity
        assert float(worth.max()) == 1.0
        assert float(worth.min()) == 0.0
    counts = Quota().allocate(tokens, 40)
    assert max(counts) == counts[3]


def test_word_relevance_against_a_plain_loop() -> None:
    layout = Layout.grid(2, 3, 4, "video")
    g = torch.Generator().manual_seed(2)
    features, words = torch.randn(24, 8, generator=g), torch.randn(5, 8, generator=g)
    unit = torch.nn.functional.normalize(features, dim=-1)
    means = unit.reshape(4, 6, 8).mean(1)
    centre = means.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    by_frame = torch.stack([torch.stack([cosine(m - centre, w, dim=0) for w in words]) for m in means])
    expected = by_frame.topk(3).values.mean(-1)
    torch.testing.assert_close(word_relevance(features, layout, words), expected)
    torch.testing.assert_close(word_relevance(features, layout, words, block=7), expected)
    each = torch.stack([torch.stack([cosine(t - centre, w, dim=0) for w in words]) for t in unit])
    by_token = each.reshape(4, 6, 5).amax(1).topk(3).values.mean(-1)
    torch.testing.assert_close(word_relevance(features, layout, words, by_token=True, block=7), by_token)


def test_only_words_that_name_something_count() -> None:
    tokens = video()
    rows = tokens.query.embeddings  # type: ignore[union-attr]
    assert rows is not None
    centred = rows - rows.mean(0)
    torch.testing.assert_close(content_words(tokens), centred[[1, 4]])  # colour, car
    unknown = replace(tokens, query=about(rows))
    torch.testing.assert_close(content_words(unknown), centred)
    short = replace(tokens, query=about(rows, ("an", "ox", "b", "is", "the")))  # an answer's letter is no word
    torch.testing.assert_close(content_words(short), centred[[1]])
    empty = replace(tokens, query=about(rows, ("what", "is", "the", "A.", "?")))
    torch.testing.assert_close(content_words(empty), centred)


def test_what_the_scorer_is_told() -> None:
    assert Quota().score_options is None
    told = Quota(score="self", decouple=True, normalize="vocab").score_options
    assert told is not None
    assert (told.source, told.normalize, told.decouple, told.entities) == ("self", "vocab", True, None)
    assert "{entities}" in told.entity_prompt
    assert "{question}" in told.query_prompt
    told = AKS(score="clip", entities=("dog", "red car")).score_options
    assert told is not None
    assert told.entities == ("dog", "red car")
    assert Quota().calibration == "minmax"
    assert Quota(score="self").calibration == "none"
    assert Quota(score="clip").calibration == "minmax"
    assert Quota(score="clip", calibrate="sigmoid").calibration == "sigmoid"


# Decoupling


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ('["red car", "traffic light"]', ["red car", "traffic light"]),
        ('```json\n["dog"]\n```', ["dog"]),
        ("Step 1: yes. Step 2: ['sky', 'man']. Step 3: ['man', 'blue  hat']", ["man", "blue hat"]),
        ("[cat, dog]", ["cat", "dog"]),
        ('["a", "a", "b"]', ["a", "b"]),
        ("[]", None),
        ("null", None),
        ('["none"]', None),
        ("No.", None),
        ("", None),
        ('["car", 3, null]', ["car"]),
        ("[__import__('os').system('true')]", ["__import__('os').system('true')"]),  # a name like any other
        ('["unfinished", "list', None),
        ("[[[[[[", None),
        ('[["nested"]]', ["nested"]),
        ("['it\\'s']", ["it's"]),
        ("[1, 2]", None),
    ],
)
def test_answers_are_read(answer: str, names: list[str] | None) -> None:
    assert parse_decoupling(answer) == names


@given(st.text(max_size=300) | st.text(alphabet="[]'\",-{}()\\ ab1\n", max_size=300))
@example("[" + "-" * 3000 + "1]")
@example("[" * 4000)
@example("['" + "x" * 5000 + "']")
@example('["\ud800"]')
@example("['\x00']")
@example("['\\d']")
@settings(max_examples=100, deadline=None)
def test_no_answer_breaks_the_reader(text: str) -> None:
    names = parse_decoupling(text)
    assert names is None or 1 <= len(names) <= MOST
    for name in names or []:
        assert isinstance(name, str)
        assert 0 < len(name) <= WIDEST
        assert name == name.strip()


@given(st.lists(st.text(alphabet="abcdefgh ", min_size=1, max_size=30), min_size=1, max_size=16))
@settings(max_examples=50, deadline=None)
def test_lists_survive_json(names: list[str]) -> None:
    import json

    clean = list(dict.fromkeys(" ".join(n.split()) for n in names if n.strip()))
    assert parse_decoupling("Here you are: " + json.dumps(names)) == (clean or None)


def test_the_prompt_holds_the_question() -> None:
    prompt = decoupling_prompt("  What colour is the dog's ball? ")
    assert "What colour is the dog's ball?" in prompt
    assert parse_decoupling(prompt) is None  # its last example is the empty list
