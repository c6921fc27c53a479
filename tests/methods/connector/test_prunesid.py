"""PruneSID: groups, suppression, apportionment and the seed."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.methods.connector.prunesid import PruneSID, group_budgets, prunesid, semantic_loadings, suppress
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
    assert torch.equal(semantic_loadings(features, 3, seed=5).argmax(-1), exact)


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
        found = suppress(x, scores, group, torch.tensor(threshold))
        assert found.nonzero()[:, 0].tolist() == nms(x, scores, group, threshold)


def test_nobody_without_a_score_survives() -> None:
    scores = torch.tensor([0.0, 0.3, 0.0, 0.2])
    found = suppress(torch.eye(4), scores, torch.zeros(4, dtype=torch.long), torch.tensor(0.5))
    assert found.tolist() == [False, True, False, True]


def test_best_of_every_group_stays() -> None:
    tokens = stream()
    x, a = tokens.signal("encoder_features"), tokens.signal("cls_attention")
    group = semantic_loadings(x, 17 // 4, 0).argmax(-1)
    kept = prunesid(x, a, 16).tolist()
    for g in range(4):
        members = (group == g).nonzero()[:, 0]
        assert int(members[a[members].argmax()]) in kept


def shares(sizes: list[int], survivors: list[int], keep: int, slots: int) -> list[int]:
    return group_budgets(torch.tensor(sizes), torch.tensor(survivors), keep, slots).tolist()


def test_budgets_by_hand() -> None:
    """One each, the rest by survivors, bounds that rise evenly until they suffice, the largest fill up."""
    sizes = [300, 60, 30, 20, 15, 10, 5]
    assert shares(sizes, sizes, 119, 120) == [24, 24, 24, 20, 15, 10, 2]
    # 10 slots: bounds 5, 3 and 2 suffice at once. 1 + round(6 * 8 / 13) - 0 = 5, 1 + (5 - 4) = 2, 1 + (6 - 5) = 2.
    assert shares([20, 9, 4], [8, 3, 2], 9, 10) == [5, 2, 2]
    # Bounds 4, 1, 1 rise twice to 4, 3, 3. Shares 5, 2, 2 are cut to 4, 2, 2; the first full group passes the one on.
    assert shares([4, 9, 3], [4, 1, 1], 9, 10) == [4, 3, 2]
    assert shares([6, 0, 2], [6, 0, 2], 7, 8) == [5, 0, 2]


def test_budgets_are_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        sizes = torch.randint(0, 30, (2, 12), generator=generator)
        sizes[:, 0] += 60
        survivors = (sizes * torch.rand(2, 12, generator=generator)).ceil().long().clamp(max=sizes)
        keep = int(torch.randint(12, int(sizes.sum(-1).min()), (1,), generator=generator))
        out = group_budgets(sizes, survivors, keep, keep + 1)
        assert out.sum(-1).tolist() == [keep, keep]
        assert ((out >= sizes.clamp_max(1)) & (out <= sizes)).all()
        assert torch.equal(out[1], group_budgets(sizes[1], survivors[1], keep, keep + 1)), "a row is its own"


def test_tiles_are_treated_one_by_one() -> None:
    layout = Layout.grid(6, 6, 3, "tiles", canvas=(1, 2), thumbnail=True)
    one = stream(108)
    tokens = VisualTokens(torch.randn(108, 8), layout, one.signals)
    x, a = one.signal("encoder_features"), one.signal("cls_attention")
    parts = [prunesid(x[t : t + 36], a[t : t + 36], 10) + t for t in (0, 36, 72)]
    assert torch.equal(PruneSID().select(tokens, 30).indices, torch.cat(parts))
    loading = PruneSID(importance="loading")
    assert loading.needs == ()
    parts = [prunesid(tokens.features[t : t + 36], None, 10) + t for t in (0, 36, 72)]
    assert torch.equal(loading.select(tokens, 30).indices, torch.cat(parts))


@claims("prunesid", anchor="kept")
def test_golden(case: GoldenCase) -> None:
    """The published kept patches behind the same seed, [CLS] taken out; without attention the form for Qwen2-VL."""
    with_cls = "attention" in case
    attention = case["attention"] if with_cls else None
    found = prunesid(case["features"], attention, case.number("keep"), case.number("seed"))
    assert found.tolist() == case["kept"].tolist()


def test_seeded() -> None:
    tokens = stream(200)
    before = torch.random.get_rng_state()
    first = PruneSID(seed=1).select(tokens, 40).indices
    assert torch.equal(first, PruneSID(seed=1).select(tokens, 40).indices)
    assert any(not torch.equal(first, PruneSID(seed=s).select(tokens, 40).indices) for s in range(2, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(OptionError, match="seed"):
        PruneSID(seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="importance"):
        PruneSID(importance="size")  # type: ignore[arg-type]
