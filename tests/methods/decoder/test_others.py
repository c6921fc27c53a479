"""TopV, DART, PromptDistill, LLaVolta and CATP inside the LLM, by hand."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoder.layers import Dense, fresh, layer_tokens, steps
from tests.published.dart import dart_in_llm
from tokprune.errors import OptionError
from tokprune.methods.decoder.catp_llm import CATPLLM, context_scores
from tokprune.methods.decoder.dart_llm import DartLLM
from tokprune.methods.decoder.llavolta import LLaVolta
from tokprune.methods.decoder.promptdistill import PromptDistill, smoothed
from tokprune.methods.decoder.topv import TopV, transport_cost, transported


def test_transport_written_out() -> None:
    cost = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = (-cost / 0.1).exp()
    for _ in range(3):
        plan = plan / plan.sum(1, keepdim=True) / 6
        plan = plan / plan.sum(0, keepdim=True) / 6
    torch.testing.assert_close(transported(cost.__getitem__, len(cost), 0.1, 3), plan.sum(1))


def test_ending_with_the_rows_would_rank_nothing() -> None:
    cost = torch.rand(40, 40, generator=torch.Generator().manual_seed(1))
    mass = transported(cost.__getitem__, len(cost), 0.1, 3)
    assert float(mass.max() - mass.min()) > 1e-4
    plan = (-cost / 0.1).exp()
    for _ in range(3):
        plan = plan / plan.sum(0, keepdim=True) / 40
        plan = plan / plan.sum(1, keepdim=True) / 40
    assert float(plan.sum(1).max() - plan.sum(1).min()) < 1e-7


def test_cost_adds_three_stretched_terms() -> None:
    generator = torch.Generator().manual_seed(2)
    source, target = torch.randn(2, 5, 3, generator=generator)
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    picture = torch.tensor([0, 0, 0, 0, 1])

    def term(*weights: float) -> torch.Tensor:
        return transport_cost(source, target, places, picture, weights, 2.0)(slice(5))  # type: ignore[arg-type]

    square = torch.tensor([[float((s - t).square().sum()) for t in target] for s in source])
    torch.testing.assert_close(term(1, 0, 0), (square - square.min()) / (square.max() - square.min()))
    apart = term(0, 1, 0)
    assert (apart[:4, 4] == 1).all()  # another picture is as far as can be
    assert (apart.diagonal() == 0).all()
    near, far = 1 - torch.exp(torch.tensor([-1 / 8, -2 / 8]))
    torch.testing.assert_close(apart[0, 1] / apart[0, 3], near / far)
    away = term(0, 0, 1)
    assert torch.equal(away[:4], torch.ones(4, 5))  # the corners of 2 x 2 are equally far from its middle
    assert (away[4] == 0).all()
    torch.testing.assert_close(term(1, 2, 3), term(1, 0, 0) + 2 * apart + 3 * away)


def test_topv_recovers_at_even_distances() -> None:
    tokens = layer_tokens(((5, 8),), seed=3)
    chosen = TopV(recovered=0.2).select(tokens, 20).indices.tolist()
    scores = TopV().scores(tokens)
    best = sorted(scores.topk(16).indices.tolist())
    rest = [j for j in range(40) if j not in best]
    assert chosen == sorted([*best, rest[3], rest[9], rest[15], rest[21]])  # the middle of each quarter of 24
    assert TopV(recovered=0).select(tokens, 16).indices.tolist() == best
    assert TopV().plan(32, None).steps == ((3, 0.5),)


@pytest.mark.parametrize("each", [0, 1, 3])
def test_dart_keeps_what_its_authors_keep(each: int) -> None:
    tokens = layer_tokens(((6, 8),), seed=4)
    assert tokens.normed is not None
    start = int(tokens.visual[0])
    expected = dart_in_llm(tokens.normed, tokens.below.keys, start, 48, each)
    chosen = DartLLM().select(tokens, 4 + 8 * each)
    assert torch.equal(tokens.visual[chosen.indices], expected)
    assert DartLLM().plan(32, None).counts(57600) == [13200]  # 132 of 576
    few = DartLLM(pivots=(2, 3)).select(tokens, 2 + 5 * each)
    assert torch.equal(tokens.visual[few.indices], dart_in_llm(tokens.normed, tokens.below.keys, start, 48, each, 2, 3))


def test_dart_reads_keys_before_their_rotation() -> None:
    class Rotated(Dense):
        """Rotation that leaves nothing of the keys' order."""

        @property
        def plain_keys(self) -> torch.Tensor:
            return self.keys.flip(1)

    tokens = layer_tokens(((6, 8),), seed=4)
    below = Rotated(tokens.below.q, tokens.below.keys, tokens.below.values)  # type: ignore[attr-defined]
    rotated = fresh(tokens, below=below)
    flipped = fresh(tokens, below=Dense(below.q, below.plain_keys, below.values))
    assert torch.equal(DartLLM().select(rotated, 12).indices, DartLLM().select(flipped, 12).indices)
    published = DartLLM(compat="published").select(rotated, 12).indices
    assert torch.equal(published, DartLLM().select(tokens, 12).indices)
    assert not torch.equal(published, DartLLM().select(rotated, 12).indices)


def test_smoothing_counts_what_is_there() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 3.0])
    assert smoothed(values, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert smoothed(values, 3, "published").tolist() == pytest.approx([1.0, 3.0, 11 / 3, 3.0])
    assert torch.equal(smoothed(values, 1), values)


def test_promptdistill_smooths_within_a_picture() -> None:
    tokens = layer_tokens(((2, 3), (1, 4)), seed=5)
    last = torch.tensor([len(tokens.columns) - 1])
    values = tokens.below.logits(last)[0, tokens.visual]
    scores = PromptDistill(smooth=3).scores(tokens)
    assert scores[5] == pytest.approx(float((values[4] + values[5]) / 2))
    assert scores[6] == pytest.approx(float((values[6] + values[7]) / 2))
    assert PromptDistill().plan(32, 0.1).steps == ((14, 0.1),)
    assert PromptDistill(compat="published").exact  # which differs in scores, not in counts
    with pytest.raises(OptionError, match="odd number"):
        PromptDistill(smooth=4)


def test_llavolta_windows_stay_in_their_picture() -> None:
    tokens = layer_tokens(((2, 4), (1, 4)), seed=6)
    chosen = LLaVolta().select(tokens, 3)
    states = tokens.hidden[tokens.visual]
    expected = torch.stack([states[0:4].mean(0), states[4:8].mean(0), states[8:12].mean(0)])
    torch.testing.assert_close(chosen.apply(states), expected)
    assert chosen.indices.tolist() == [1, 5, 9]
    assert LLaVolta().plan(32, None).steps == ((2, 0.125),)


def test_context_scores_written_out() -> None:
    now, before = torch.tensor([0.5, 0.1, 0.2]), torch.tensor([0.2, 0.3, 0.2])
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    question = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    expected = torch.tensor([0.3 + 0.6, 0.0, 0.6 / 2**0.5])
    torch.testing.assert_close(context_scores(now, before, states, question), expected)


def test_catp_examples_first_then_the_question() -> None:
    tokens = layer_tokens(((4, 5), (4, 5), (2, 5)), seed=7)
    shown = steps(CATPLLM(), tokens, [15, 15])
    first, second = (chosen.indices for _, chosen in shown)
    assert first[-10:].tolist() == list(range(40, 50))  # the question's picture waits
    assert len(first) == 12 + 10  # 0.3 of 40 stay
    later = shown[1][0]
    left = second[later.picture[second] == 2]
    assert len(left) == 3
    assert len(second) == 15
    start = int(later.visual[later.picture == 2][0])
    close = torch.cosine_similarity(later.hidden[later.visual], later.hidden[:start].mean(0, keepdim=True))
    assert left.tolist() == sorted((12 + close[12:].topk(3).indices).tolist())
    states, own = tokens.hidden, int(tokens.visual[tokens.picture == 2][0])
    rise = (tokens.own.weights(tokens.last) - tokens.below.weights(tokens.last))[0, tokens.visual].clamp(min=0)
    score = rise + 0.6 * torch.cosine_similarity(states[tokens.visual], states[own:].mean(0, keepdim=True))
    assert first[:12].tolist() == sorted(score[:40].topk(12).indices.tolist())


def test_catp_one_picture_goes_by_the_question() -> None:
    tokens = layer_tokens(((4, 5),), seed=8)
    shown = steps(CATPLLM(), tokens, [6, 6])
    assert [len(chosen) for _, chosen in shown] == [6, 6]
    with pytest.raises(OptionError, match="ratio"):
        CATPLLM().plan(32, None)
    assert CATPLLM().plan(32, 0.3).layers == (6, 7)
    assert CATPLLM().plan(4, 0.3).layers == (1, 2)


def test_catp_cuts_the_context_where_the_question_is_not_enough() -> None:
    tokens = layer_tokens(((4, 5), (1, 2)), seed=9)
    shown = steps(CATPLLM(), tokens, [1, 1])
    assert len(shown[-1][1]) == 1
    assert len(CATPLLM().select(fresh(tokens), 22)) == 22
