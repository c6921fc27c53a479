"""CDPruner against the published order, and where its kernel runs out of rank or of relevance."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.connector.cdpruner import CDPruner, cdpruner, quality
from tokprune.methods.question import text_relevance
from tokprune.tokens import Layout, Query, VisualTokens


@claims("cdpruner", anchor="features")
def test_golden(case: GoldenCase) -> None:
    features, keep = case["features"], case.number("T")
    weight = quality(-text_relevance(case["image_embeds"], case["text_embeds"]))
    order = cdpruner(features, weight, keep)
    assert torch.equal(order, case["order"])
    assert torch.equal(order.sort(-1).values, case["kept_sorted"])


@claims("cdpruner", anchor="features", part="the method's choice")
def test_golden_through_select(case: GoldenCase) -> None:
    tiles, n, _ = case["features"].shape
    tokens = VisualTokens(
        case["features"].flatten(0, 1),
        Layout.grid(1, n, tiles, kind="tiles"),
        {"clip_image": case["image_embeds"].flatten(0, 1)},
        Query(clip=case["text_embeds"]),
    )
    chosen = CDPruner(relevance="clip", compat="published").select(tokens, tiles * case.number("T")).indices
    assert torch.equal(chosen, (case["kept_sorted"] + n * torch.arange(tiles)[:, None]).flatten())


def stream(n: int = 40, d: int = 16, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    return VisualTokens(
        torch.randn(n, d, generator=generator),
        Layout.line(n),
        query=Query("a red car", torch.randn(3, d, generator=generator)),
    )


def test_follows_the_determinant() -> None:
    """Greedy MAP word by word: each pick maximises the determinant of the kernel of the set."""
    tokens = stream(14)
    raw = text_relevance(tokens.features, tokens.query.embeddings)  # type: ignore[union-attr, arg-type]
    weight = quality(raw).double()
    x = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    kernel = weight[:, None] * (x @ x.T) * weight
    chosen: list[int] = []
    for _ in range(8):
        gain = {j: torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]]).item() for j in set(range(14)) - set(chosen)}
        chosen.append(max(gain, key=gain.__getitem__))
    assert cdpruner(tokens.features[None], quality(raw)[None], 8)[0].tolist() == chosen
    assert CDPruner().select(tokens, 8).indices.tolist() == sorted(chosen)


def test_more_tokens_than_rank_follow_relevance() -> None:
    features = torch.eye(4).repeat(5, 1)  # 20 tokens, 4 directions
    relevance = torch.arange(20.0)
    order = cdpruner(features[None], quality(relevance)[None], 20)[0].tolist()
    assert order[:4] == [19, 18, 17, 16]
    assert order[4:] == list(range(15, -1, -1))


def test_quality_reaches_from_a_millionth_to_one() -> None:
    assert quality(torch.tensor([-1.0, 0.0, -0.5])).tolist() == pytest.approx([1e-6, 1.0, 0.5], rel=1e-4)
    assert quality(torch.tensor([-1.0, 0.0])).max() == 1
    assert quality(torch.full((3,), 0.3)).tolist() == [1.0] * 3


def test_equal_relevance_is_pure_diversity() -> None:
    features = torch.eye(4).repeat(3, 1)
    assert cdpruner(features[None], quality(torch.full((12,), 0.3))[None], 4)[0].tolist() == [0, 1, 2, 3]


def test_sign_and_space() -> None:
    tokens = stream()
    near = text_relevance(tokens.features, tokens.query.embeddings)  # type: ignore[union-attr, arg-type]
    best, worst = near.argmax().item(), near.argmin().item()
    assert best in CDPruner().select(tokens, 1).indices.tolist()
    assert worst in CDPruner(sign=-1).select(tokens, 1).indices.tolist()
    clip = VisualTokens(tokens.features, tokens.layout, {"clip_image": tokens.features}, Query(clip=tokens.features[7]))
    assert CDPruner(relevance="clip", sign=1).select(clip, 1).indices.tolist() == [7]
    assert CDPruner(relevance="clip").needs == ("clip_image", "clip_text")
    assert CDPruner().needs == ()


def test_theta_moves_towards_relevance() -> None:
    tokens = stream(60)
    near = text_relevance(tokens.features, tokens.query.embeddings)  # type: ignore[union-attr, arg-type]
    means = [near[CDPruner(theta=t).select(tokens, 10).indices].mean().item() for t in (0.0, 0.9, 0.99)]
    assert means[0] < means[1] <= means[2]


def test_batch_equals_single() -> None:
    batch = [stream(30, seed=i) for i in range(3)] + [stream(20)]
    keeps = [9, 9, 5, 9]
    together = CDPruner().select_batch(batch, keeps)
    for tokens, keep, selection in zip(batch, keeps, together, strict=True):
        assert torch.equal(selection.indices, CDPruner().select(tokens, keep).indices)


def test_what_is_missing_is_said() -> None:
    tokens = stream()
    with pytest.raises(MissingQueryError, match="apply"):
        CDPruner().select(VisualTokens(tokens.features, tokens.layout), 3)
    with pytest.raises(MissingQueryError, match="processor=processor"):
        CDPruner().select(VisualTokens(tokens.features, tokens.layout, query=Query("x")), 3)
    with pytest.raises(MissingQueryError, match="relevance='embeddings'"):
        CDPruner(relevance="clip").select(tokens, 3)
    with pytest.raises(OptionError, match="clip"):
        CDPruner(relevance="siglip")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="theta"):
        CDPruner(theta=1.0)
