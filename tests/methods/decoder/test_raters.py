"""SparseVLM and SparseVLM+ by hand: counts, raters, recycling, the pull of positions."""

from __future__ import annotations

import pytest
import torch

from tests.methods.decoder.layers import Dense, fresh, given, layer_tokens, steps
from tokprune.methods.decoder.sparsevlm import SparseVLM, kept_and_merged, recycling
from tokprune.methods.decoder.sparsevlm_plus import SparseVLMPlus, looking_heads, without_gravity
from tokprune.methods.decoder_base import in_depth

SETTINGS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


def test_layers_move_with_the_depth() -> None:
    assert in_depth((3, 7, 16), 32) == (3, 7, 16)
    assert in_depth((3, 7, 16), 64) == (6, 14, 32)
    assert in_depth((3, 7, 16), 4) == (1, 2, 3)
    assert in_depth((3, 7, 16), 2) == (1,)


@pytest.mark.parametrize("setting", SETTINGS)
def test_published_counts_with_their_means(setting: int) -> None:
    """Means come on top of the published lists; the average of a setting, layers 2, 6, 15 counted as pruned, is its
    name.
    """
    left, layers, total = 576, (2, 4, 9, 17), 2 * 576
    for kept, span in zip(SETTINGS[setting], layers[1:], strict=True):
        clusters = recycling(left - kept)[1]
        assert kept_and_merged(left, kept + clusters) == (kept, clusters)
        left = kept + clusters
        total += span * left
    assert abs(total / 32 - setting) < 1


def test_the_default_is_the_setting_of_192() -> None:
    assert SparseVLM().plan(32, None).counts(576) == [309, 204, 113]
    assert SparseVLMPlus().plan(32, None).counts(576) == [300, 200, 118]
    assert SparseVLM().plan(32, None).layers == (3, 7, 16)


@pytest.mark.parametrize("n", [1, 2, 9, 50, 576])
def test_slots_are_always_filled(n: int) -> None:
    for keep in range(n + 1):
        kept, merged = kept_and_merged(n, keep)
        assert kept + merged == keep
        assert merged <= max(recycling(n - kept)[0], 0)
        assert merged <= kept


def test_raters_are_chosen_once_and_rate() -> None:
    hidden = torch.zeros(12, 4)
    hidden[:, 0] = 1
    hidden[2:8, 1] = 2  # six visual tokens
    hidden[9, 1] = 3  # of the words 8 ... 11 they match this one
    generator = torch.Generator().manual_seed(0)
    below = Dense(*torch.randn(3, 1, 12, 4, generator=generator))
    tokens = given(hidden, 2, 6, below, embeddings=hidden)
    chosen = SparseVLMPlus().select(tokens, 3)
    assert tokens.notes["raters"].tolist() == [9]
    row = below.weights(torch.tensor([9]))[0, 2:8] / below.gravity(torch.tensor([9]))[0, 2:8]
    assert chosen.indices.tolist() == sorted(row.topk(3).indices.tolist())
    later = fresh(tokens, columns=torch.arange(12) + 5, embeddings=hidden.flip(0))
    later.notes["raters"] = torch.tensor([9 + 5])
    assert torch.equal(SparseVLMPlus().select(later, 3).indices, chosen.indices)


def test_recycling_written_out() -> None:
    tokens = layer_tokens(((8, 10),), seed=3)
    states, keep = tokens.hidden[tokens.visual], 23
    chosen = SparseVLM().select(tokens, keep)
    score = chosen.info["scores"].tolist()
    kept, clusters = kept_and_merged(80, keep)
    order = sorted(range(80), key=lambda j: -score[j])
    again = order[kept:][: recycling(80 - kept)[0]]
    assert (kept, clusters, len(again)) == (21, 2, 18)
    distance = torch.cdist(states[again], states[again]) / 4
    rho = [(-(row.square().sort().values[:clusters]).mean()).exp().item() for row in distance]
    delta = [
        min([distance[i, j].item() for j in range(18) if rho[j] > rho[i]] or [distance.max().item()]) for i in range(18)
    ]
    centres = sorted(range(18), key=lambda i: -rho[i] * delta[i])[:clusters]
    into = [i if i in centres else min(centres, key=lambda c: distance[i, c].item()) for i in range(18)]
    assert chosen.indices.tolist() == sorted(order[:kept] + [again[c] for c in centres])
    out = chosen.apply(states)
    for slot, index in enumerate(chosen.indices.tolist()):
        members = [index] if index in order[:kept] else [again[i] for i in range(18) if again[into[i]] == index]
        torch.testing.assert_close(out[slot], states[members].mean(0))


def test_the_rank_rule_needs_no_count() -> None:
    tokens = layer_tokens(((6, 6),), seed=4)
    method = SparseVLM(rank=(2.0, 1.0))
    assert not method.exact
    assert SparseVLM().exact
    assert method.plan(32, None).last == 1.0
    chosen = method.select(fresh(tokens, bound=False), 36)
    seen = tokens.below.weights(method.asked(fresh(tokens)))[:, tokens.visual]
    kept = min(int(torch.linalg.matrix_rank(seen)) * 2 + 1, 35)
    assert len(chosen) == kept + recycling(36 - kept)[1]
    assert len(method.select(fresh(tokens), 20)) == 20


def test_merged_tokens_compete_again() -> None:
    shown = steps(SparseVLM(), layer_tokens(((8, 8),), seed=5), [40, 20, 10])
    assert [len(chosen) for _, chosen in shown] == [40, 20, 10]
    assert torch.equal(shown[0][0].notes["raters"], shown[2][0].notes["raters"])


def test_the_pull_of_positions_is_taken_out() -> None:
    attention = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(6))
    gravity = torch.tensor([[2.0, 1.0, 0.5, -1.0], [1.0, 4.0, 0.25, 0.0]])
    out = without_gravity(attention, gravity)
    assert torch.equal(out[:, 0, :3], attention[:, 0, :3] / gravity[0, :3])
    assert torch.equal(out[:, 0, 3], attention[:, 0, 3] / 0.25)  # never a negative attention
    assert torch.equal(without_gravity(attention, -gravity.abs() - 1), attention)


def test_heads_that_look_most() -> None:
    attention = torch.zeros(5, 2, 3)
    attention[3, 0, 1], attention[1, 1, 2], attention[0, 0, 0] = 3.0, 2.0, 1.0
    assert looking_heads(attention, 2).tolist() == [1, 3]
    assert looking_heads(attention, 14).tolist() == [0, 1, 2, 3, 4]
