"""MustDrop, FitPrune, ATP-LLaVA by hand: thresholds, tables, fitting, calibration."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoder.layers import Dense, Rows, after, fresh, given, layer_tokens
from tokprune.errors import OptionError
from tokprune.methods.decoder.atp import (
    ATPLLaVA,
    ThresholdHeads,
    atp_loss,
    calibrate,
    redundancy,
    soft_mask,
    spatial_scores,
)
from tokprune.methods.decoder.fitprune import DELETED, FitPrune, deletable, fit, sums
from tokprune.methods.decoder.mustdrop import MustDrop, dual_filter
from tokprune.profiling.formulas import formula_gated
from tokprune.schedule import Schedule

CLS = "cls_attention:-1"


def test_mustdrop_thresholds_written_out() -> None:
    tokens = fresh(layer_tokens(((5, 6), (3, 4)), (CLS,), seed=1), bound=False)
    method = MustDrop(overall=0.022, single=0.03)
    chosen = method.select(tokens, 42)
    seen = tokens.below.weights(tokens.behind)[:, tokens.visual]
    total, signal = seen.sum(0), tokens.signals[CLS]
    keys = {*signal[:30].topk(3).indices.tolist(), *(30 + signal[30:].topk(1).indices).tolist()}  # 0.08 of each, up
    stays = [j for j in range(42) if j in keys or not (total[j] < 0.022 * total.sum() and (seen[:, j] < 0.03).all())]
    assert chosen.indices.tolist() == stays
    assert 4 < len(stays) < 42
    later = after(tokens, chosen, 2)
    assert later.notes is tokens.notes
    left = method.select(later, len(stays)).indices
    assert keys <= {stays[i] for i in left.tolist()}


def test_mustdrop_a_threshold_of_zero_never_lets_go() -> None:
    attention = torch.tensor([[0.0, 0.25], [0.0, 0.5]])  # sums 0 and .75, largest 0 and .5
    assert dual_filter(attention, 0.5, 0.25).tolist() == [0, 2]
    assert dual_filter(attention, 0.0, 0.25).tolist() == dual_filter(attention, 0.5, 0.0).tolist() == [float("inf")] * 2


def test_mustdrop_filters_behind_layers_2_6_10_and_14() -> None:
    assert MustDrop().plan(32, None).layers == (3, 7, 11, 15)


def test_mustdrop_a_count_moves_both_thresholds() -> None:
    tokens = layer_tokens(((6, 7),), (CLS,), seed=3)
    for keep in (5, 12, 30):
        chosen = MustDrop(overall=0.02, single=0.02).select(fresh(tokens), keep)
        keys = tokens.signals[CLS].topk(4).indices  # 0.08 of 42, up
        others = chosen.indices[~torch.isin(chosen.indices, keys)]
        assert len(others) == keep - 4
        border = 0.02 * 0.9999 * float(chosen.info["scores"][others].min())
        free = MustDrop(overall=border, single=border)
        assert torch.equal(free.select(fresh(tokens, bound=False), 42).indices, chosen.indices)


def test_fitprune_table_of_the_paper() -> None:
    plan = FitPrune().plan(32, None)
    left, expected = 576, []
    for gone in DELETED[:-1]:
        left -= gone
        expected.append(left)
    by_layer = dict(zip(plan.layers, plan.counts(576), strict=True))
    assert [by_layer.get(at) or round(576 * plan.share(at)) for at in range(1, 32)] == expected
    assert expected[-1] == 127
    published = [*expected, 127]  # the paper counts a layer by what it leaves; its attention still has the others
    assert sum(published) / 32 == pytest.approx(231, abs=0.5)
    attention = sum(formula_gated(n, 4096, 0) for n in [576, *expected])
    mlp = sum(3 * n * 4096 * 11008 for n in published)
    assert (attention + mlp) / (32 * formula_gated(576, 4096, 11008)) == pytest.approx(0.403, abs=0.003)
    assert plan.average(32) * 576 == pytest.approx(245, abs=0.5)


def test_fitprune_other_depths_and_ratios() -> None:
    assert FitPrune().plan(4, None).share(2) == pytest.approx(1 - sum(DELETED[:16]) / 576)
    plan = FitPrune().plan(32, 0.5)
    assert plan.last == 0.5
    full = FitPrune().plan(32, None)
    assert plan.share(5) == pytest.approx(1 - (1 - full.share(5)) * 0.5 / (1 - full.last))
    assert FitPrune().plan(32, 1.0).steps == ((31, 1.0),)
    with pytest.raises(OptionError, match="of 576"):
        FitPrune(deleted=(500, 100))


def test_what_a_layer_can_lose() -> None:
    cross, own = torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    # alpha 0.3: cross may lose 3 of 10 (tokens 1, 2), own 3 of 10 (tokens 0, 1); both: token 1
    assert deletable(cross, own, 0.3) == 1
    assert deletable(cross, own, 0.0) == 0
    assert deletable(cross, own, 1.0) == 4


def test_fit_meets_its_target_with_the_least_alpha() -> None:
    samples = []
    for seed in range(3):
        tokens = layer_tokens(((6, 6),), seed=seed)
        samples.append([sums(tokens), sums(fresh(tokens, below=tokens.own))])

    def cost(schedule: Schedule) -> float:
        return schedule.average(3)

    for target in (0.5, 0.7, 0.9):
        found = fit(samples, cost, target)
        assert cost(found) <= target
        assert found.layers == (1, 2)
        FitPrune(schedule=found.steps)
    loose, tight = fit(samples, cost, 0.9), fit(samples, cost, 0.5)
    assert all(a >= b for (_, a), (_, b) in zip(loose.steps, tight.steps, strict=True))
    alpha = [deletable(*samples[0][0], step / 100) for step in range(0, 101, 10)]
    assert alpha == sorted(alpha)
    with pytest.raises(OptionError, match="at least one sample"):
        fit([], cost, 0.5)


def test_atp_scores_written_out() -> None:
    tokens = layer_tokens(((3, 4),), seed=5)
    own, cross = redundancy(tokens)
    below = tokens.below
    assert isinstance(below, Dense)
    k = below.keys.repeat_interleave(2, 0)
    for place, j in enumerate(tokens.visual.tolist()):
        logits = [(below.q[:, i] * k[:, j]).sum(1).mean() / 6**0.5 for i in tokens.visual.tolist()]
        torch.testing.assert_close(own[place], torch.stack(logits).mean())
    torch.testing.assert_close(cross, below.weights(tokens.behind)[:, tokens.visual].mean(0))


def test_sparser_grids_count_more() -> None:
    row, col = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    score = spatial_scores(row.flatten(), col.flatten()).view(24, 24)
    assert score[6, 6] == pytest.approx(1 - 3 / 144)
    assert score[1, 1] == pytest.approx(1 - 3 / 9)
    assert score[0, 0] == 0
    assert int((score > 0.98 - 0.01).sum()) == 4
    assert int((score > 0.9).sum()) == 16 + 9 + 4  # strides 6, 8 and 12, no cell of which is another's


def test_calibrated_thresholds_keep_the_share() -> None:
    generator = torch.Generator().manual_seed(6)
    place = torch.arange(24)
    spatial = spatial_scores(place.repeat_interleave(24), place.repeat(24))
    samples = [torch.randn(576, generator=generator) for _ in range(4)]
    for share in (0.1, 0.25, 0.6, 0.97):
        important, even = calibrate(samples, [spatial] * 4, share)
        kept = [((s > important) | (spatial > even)).float().mean() for s in samples]
        assert sum(kept) / 4 == pytest.approx(share, abs=1e-3)
    important, even = calibrate(samples, [spatial] * 4, 0.01)  # less than the cover alone
    assert even == 2.0
    for scores in ([], samples[:1]):
        with pytest.raises(OptionError, match="of the same samples, at least one"):
            calibrate(scores, [spatial] * 2 if scores else [], 0.5)


def test_atp_thresholds_and_the_exact_form() -> None:
    tokens = layer_tokens(((8, 8),), seed=7)
    method = ATPLLaVA(layers=(8, 16), thresholds=((0.05, 0.7), (0.0, 2.0)))
    free = fresh(tokens, bound=False)
    scores, spatial = redundancy(tokens).mean(0), spatial_scores(tokens.row, tokens.col)
    first = method.select(free, 64).indices
    assert torch.equal(first, ((scores > 0.05) | (spatial > 0.7)).nonzero()[:, 0])
    assert torch.equal(method.select(free, 64).indices, (scores > 0).nonzero()[:, 0])  # the second layer's
    cover = ATPLLaVA(layers=(8,), thresholds=((1e9, 1 - 3 / 16),)).select(fresh(tokens, bound=False), 64).indices
    assert cover.tolist() == [3 * 8 + 3, 4 * 8 + 4, 6 * 8 + 6]  # strides 6, 8 and 12: above that of stride 4, not at it
    even = set(spatial.topk(4).indices.tolist())
    chosen = set(ATPLLaVA().select(fresh(tokens), 16).indices.tolist())
    assert len(chosen & set((spatial >= spatial.topk(4).values[-1]).nonzero()[:, 0].tolist())) >= len(even)
    rest = [j for j in scores.argsort(descending=True).tolist() if j not in chosen]
    assert scores[rest[0]] <= sorted(scores[list(chosen)].tolist())[4]
    with pytest.raises(OptionError, match="1 thresholds for 3 layers"):
        ATPLLaVA(thresholds=((0.1, 0.9),))
    with pytest.raises(OptionError, match="ratio"):
        ATPLLaVA().plan(32, None)


def test_learned_thresholds_follow_the_loss() -> None:
    torch.manual_seed(0)
    heads = ThresholdHeads()
    scores = torch.rand(8, 2, 64, generator=torch.Generator().manual_seed(8))
    spatial = torch.zeros(8, 64)
    optimizer = torch.optim.SGD(heads.parameters(), 0.05)

    def kept() -> float:
        return float((scores.mean(1) > heads(scores)[:, :1]).float().sum(1).mean())

    before = kept()
    for _ in range(150):
        loss = atp_loss([soft_mask(scores, spatial, heads(scores), 40.0)], target=16.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(kept() - 16) < abs(before - 16) / 2
    assert ((heads(scores) > 0) & (heads(scores) < 1)).all()


def test_deeper_stages_cost_more() -> None:
    some, none = torch.full((4,), 0.5), torch.zeros(4)
    assert atp_loss([some, none], 1.0) < atp_loss([none, some], 1.0)


def test_rows_given_are_what_methods_read() -> None:
    rows = torch.rand(2, 3, 9, generator=torch.Generator().manual_seed(9)).softmax(-1)
    tokens = given(torch.zeros(9, 4), 1, 5, Rows(rows))
    assert torch.equal(tokens.below.weights(tokens.behind), rows.mean(0))
