"""PruneSID: groups, suppression, apportionment and the seed."""

from __future__ import annotations

import pytest
import torch

from tokprune.errors import OptionError
from tokprune.methods.connector.prunesid import PruneSID, prunesid, semantic_groups, suppress
from tokprune.tokens import Layout, VisualTokens


def stream(n: int = 64, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    signals = {
        "encoder_features": torch.randn(n, 24, generator=generator),
        "cls_attention": torch.rand(n, generator=generator),
    }
    return VisualTokens(torch.randn(n, 8, generator=generator), Layout.line(n), signals)


def test_groups_are_principal_components() -> None:
    """Against an exact decomposition, where the leading components are far enough apart to be found by both."""
    generator = torch.Generator().manual_seed(1)
    membership = torch.arange(30) % 3
    patterns = torch.randn(40, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    features = (patterns[:, membership] + 0.01 * torch.randn(40, 30, generator=generator)).T
    samples = torch.sigmoid(features).T
    exact = torch.linalg.svd(samples - samples.mean(0), full_matrices=False).Vh[:3].T.abs().argmax(-1)
    assert torch.equal(semantic_groups(features, 3, seed=5), exact)


def nms(x: torch.Tensor, scores: torch.Tensor, group: torch.Tensor, threshold: float) -> list[int]:
    """Greedy suppression, token by token."""
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    kept: list[int] = []
    for i in sorted(range(len(x)), key=lambda i: (-scores[i].item(), i)):
        if not any(group[i] == group[j] and cosine[i, j] > threshold for j in kept):
            kept.append(i)
    return sorted(kept)


def test_suppression_equals_the_rule_written_out() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 3, generator=generator)
    scores = torch.rand(50, generator=generator)
    scores[10:20] = 0.5  # ties
    group = torch.randint(0, 4, (50,), generator=generator)
    for threshold in (-0.5, 0.2, 0.7, 2.0):
        found = suppress(x, scores, group, torch.tensor(threshold), 50)
        assert found.nonzero()[:, 0].tolist() == nms(x, scores, group, threshold)


def test_best_of_every_group_stays() -> None:
    tokens = stream()
    x, a = tokens.signal("encoder_features"), tokens.signal("cls_attention")
    group = semantic_groups(x, 16 // 4, 0)
    kept = prunesid(x, a, 16).tolist()
    for g in range(4):
        members = (group == g).nonzero()[:, 0]
        assert int(members[a[members].argmax()]) in kept


def test_shares_follow_the_survivors() -> None:
    """No suppression (one direction each): every group's share is its size's share of the budget."""
    x = torch.eye(48)
    a = torch.linspace(1, 2, 48)
    group = semantic_groups(x, 3, 0)
    kept = prunesid(x, a, 12)
    sizes = torch.bincount(group, minlength=3)
    found = torch.bincount(group[kept], minlength=3)
    assert found.sum() == 12
    assert (found <= 5).all(), "5 ceil(12 / 64) is the most of one group"
    assert (found >= (sizes > 0).long()).all()


def test_repeated_tokens_fill_up_by_attention() -> None:
    """One group of equal tokens, one survivor: the most attended of the others follow."""
    a = torch.linspace(0, 1, 20).roll(3)
    kept = prunesid(torch.ones(20, 4), a, 7)
    assert kept.tolist() == sorted(a.topk(7).indices.tolist())


def test_seeded() -> None:
    tokens = stream(200)
    before = torch.random.get_rng_state()
    first = PruneSID(seed=1).select(tokens, 40).indices
    assert torch.equal(first, PruneSID(seed=1).select(tokens, 40).indices)
    assert any(not torch.equal(first, PruneSID(seed=s).select(tokens, 40).indices) for s in range(2, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(OptionError, match="seed"):
        PruneSID(seed=0.5)  # type: ignore[arg-type]
