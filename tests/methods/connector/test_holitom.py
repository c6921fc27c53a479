"""HoliTom's outer stage against the published tokens; the cut into scenes; exact budgets."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tests.methods.connector.clips import clip, video
from tests.published.holitom import holitom
from tokprune.errors import OptionError
from tokprune.methods.connector.holitom import HoliTom, static_runs
from tokprune.ops.similarity import unit
from tokprune.tokens import Layout, VisualTokens


@claims("holitom", anchor="feat")
def test_golden(case: GoldenCase) -> None:
    features, attention = case["feat"].float(), case["attn"]
    frames, n, width = features.shape
    retain, tau = case["params_retain_tau"].tolist()
    rows = unit(features)
    similarity = (rows[1:] * rows[:-1]).sum(-1)
    torch.testing.assert_close(similarity, case["sim"], atol=1e-5, rtol=1e-5)
    lengths, saved = static_runs(similarity > tau)
    assert saved == case.number("reduced")
    assert lengths == [end - start + 1 for start, end in case["windows"].tolist()]
    for beta, name in ((0.6, "out_beta0.6_D0"), (None, "out_mean_D0")):
        out, home, _, ratio = holitom(features, attention, retain, tau, beta)
        assert ratio == pytest.approx(case.number("ratio_eff"))
        torch.testing.assert_close(out, case[name], atol=1e-5, rtol=1e-5)
    scene = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.bincount(scene[home // n], minlength=len(lengths)).tolist() == case["seg_sizes"].tolist()

    # In the order of the stream, with a newline behind each row that keeps a token: the published grid mode.
    out, home, _, _ = holitom(features, attention, retain, tau, 0.6)
    order, g = home.argsort(), round(n**0.5)
    out, row = out[order], home[order] // g
    keep = round(retain * frames * n)
    if keep == pytest.approx(retain * frames * n, abs=1e-9):  # a count says what the published share says
        layout = Layout.grid(g, g, frames, "video")
        tokens = VisualTokens(features.flatten(0, 1), layout, {"cls_attention": attention.flatten()})
        selection = HoliTom(tau=tau, compat="published").select(tokens, keep)
        assert torch.equal(selection.indices, home[order])
        torch.testing.assert_close(selection.apply(tokens.features), out)
    expected = []
    for i in range(len(out)):
        expected.append(out[i])
        if i + 1 == len(out) or row[i + 1] != row[i]:
            expected.append(torch.full((width,), 7.0))
    torch.testing.assert_close(torch.stack(expected), case["out_grid_newline7"], atol=1e-5, rtol=1e-5)


def test_the_cut_saves_most_of_all_cuts() -> None:
    g = torch.Generator().manual_seed(1)
    for p in (0.3, 0.6, 0.9):
        static = torch.rand(6, 5, generator=g) < p

        def saved(lengths: list[int], static: torch.Tensor = static) -> int:
            total, begin = 0, 0
            for length in lengths:
                total += int(static[begin : begin + length - 1].all(0).sum()) * (length - 1) if length > 1 else 0
                begin += length
            return total

        cuts = [
            [b - a for a, b in itertools.pairwise([0, *ends, 7])]
            for k in range(7)
            for ends in itertools.combinations(range(1, 7), k)
        ]
        lengths, found = static_runs(static)
        assert found == saved(lengths) == max(saved(cut) for cut in cuts)


def test_a_cluster_leans_to_its_centre_and_rows_add_up_to_one() -> None:
    tokens = video(clip(9, scenes=3, moving=0.2), (6, 6))
    for keep in (20, 60, 150, 300):
        selection = HoliTom().select(tokens, keep)
        assert selection.weights is not None
        rows = selection.weights.dense(keep, len(tokens))
        torch.testing.assert_close(rows.sum(-1), torch.ones(keep), atol=1e-5, rtol=1e-5)
    assert not torch.equal(
        HoliTom(beta=None).select(tokens, 20).apply(tokens.features),
        HoliTom().select(tokens, 20).apply(tokens.features),
    )


def test_moving_tokens_stay_by_attention() -> None:
    tokens = video(clip(4, width=64, scenes=1, moving=1.1), (6, 6))
    selection = HoliTom().select(tokens, 40)
    best = [a.topk(10).indices.sort().values + 36 * t for t, a in enumerate(tokens.signals["cls_attention"].split(36))]
    assert torch.equal(selection.indices, torch.cat(best))


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="beta"):
        HoliTom(beta=0.0)


def test_static_runs_of_extremes() -> None:
    assert static_runs(torch.zeros(0, 4, dtype=torch.bool)) == ([1], 0)
    assert static_runs(torch.ones(6, 4, dtype=torch.bool)) == ([7], 24)
    assert static_runs(torch.zeros(3, 4, dtype=torch.bool)) == ([1, 1, 1, 1], 0)
    assert static_runs(torch.ones(6, 4, dtype=torch.bool), longest=3)[1] == 2 * 8
