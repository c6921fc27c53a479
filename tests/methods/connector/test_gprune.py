"""G-Prune against its rule written out in float64, and the published tokens of a tiled picture."""

from __future__ import annotations

import pytest
import torch

from tests.golden_vectors import GoldenCase, claims
from tokprune.errors import OptionError
from tokprune.methods.connector.gprune import GPrune, gprune
from tokprune.tokens import Layout, VisualTokens


def clustered(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=generator)
    return centres[torch.arange(40) % 5] + 0.5 * torch.randn(40, 16, generator=generator)


def written_out(x: torch.Tensor, threshold: float = 0.5, temperature: float = 0.03, steps: int = 5) -> torch.Tensor:
    """Matrix power and all, as the published port does it."""
    x = x.double()
    unit = torch.nn.functional.normalize(x, dim=-1)
    adjacency = unit @ unit.T
    adjacency[adjacency < threshold] = 0
    degree = (adjacency > 0).sum(0)
    shares = adjacency / temperature
    shares[shares == 0] = -5000
    return (x.norm(dim=-1)[None] @ torch.linalg.matrix_power(shares.softmax(-1), steps))[0] / degree


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3, "temperature": 0.1, "steps": 2}])
def test_equals_the_rule_written_out(options: dict[str, float]) -> None:
    x = clustered(0)
    expected = written_out(x, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(gprune(x, **options).double(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    kept = GPrune(**options).select(VisualTokens(x, Layout.line(40)), 11).indices  # type: ignore[arg-type]
    assert kept.tolist() == sorted(expected.topk(11).indices.tolist())


@claims("gprune", anchor="features")
def test_golden(case: GoldenCase) -> None:
    """Thumbnail and canvas of a tiled picture, each graph with its own count (tokens without newlines)."""
    x, thumbnail = case["features"], case.number("thumbnail")
    rows, cols = case["canvas"].tolist()
    scores = gprune(x[:thumbnail]), gprune(x[thumbnail:])
    counts = [int(case.number("ratio") * thumbnail), int(case.number("ratio") * rows * cols)]
    ours = [s.topk(k).indices.sort().values for s, k in zip(scores, counts, strict=True)]
    assert torch.equal(torch.cat([ours[0], ours[1] + thumbnail]), case["kept"])
    side = round(thumbnail**0.5)
    cell = torch.arange(rows * cols)
    layout = Layout(
        torch.cat([torch.zeros(thumbnail, dtype=torch.long), torch.ones(rows * cols, dtype=torch.long)]),
        torch.cat([torch.arange(thumbnail) // side, cell // cols]),
        torch.cat([torch.arange(thumbnail) % side, cell % cols]),
        ((side, side), (rows, cols)),
        "tiles",
        (1, 1),
        True,
    )
    assert torch.equal(GPrune().select(VisualTokens(x, layout), len(case["kept"])).indices, case["kept"])


def test_thumbnail_and_canvas_are_two_graphs() -> None:
    x = clustered(3).repeat(2, 1)[:72] + 0.01 * torch.arange(72)[:, None]
    layout = Layout.grid(4, 6, 3, "tiles", canvas=(1, 2), thumbnail=True)
    tokens = VisualTokens(x, layout)
    scores = GPrune().scores(tokens)
    assert torch.equal(scores, torch.cat([gprune(x[:24]), gprune(x[24:])]))
    for keep in (1, 7, 30, 72):
        kept = GPrune().select(tokens, keep).indices
        assert abs(int((kept < 24).sum()) - keep / 3) < 1
        assert len(kept.unique()) == keep
    frames = VisualTokens(x, Layout.grid(4, 6, 3, "video"))
    assert torch.equal(GPrune().scores(frames), gprune(x))


def test_a_crowd_does_not_keep_all_its_members() -> None:
    """Twenty copies of one token and five single ones, all of norm 1: the single ones come first."""
    x = torch.eye(6)[torch.tensor([0] * 20 + [1, 2, 3, 4, 5])]
    assert gprune(x).topk(5).indices.sort().values.tolist() == [20, 21, 22, 23, 24]


def test_graphs_of_a_batch_do_not_meet() -> None:
    x = torch.stack([clustered(4), clustered(5)])
    torch.testing.assert_close(gprune(x), torch.stack([gprune(x[0]), gprune(x[1])]))


def test_information_is_conserved() -> None:
    """Without the division by the degree, the flow only moves."""
    x = clustered(1)
    linked = (torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) >= 0.5).sum(-1)
    torch.testing.assert_close((gprune(x) * linked).sum(), x.norm(dim=-1).sum())


def test_a_zero_token_takes_nothing() -> None:
    x = clustered(2)
    x[4] = 0
    assert gprune(x)[4] == 0


def test_options_are_checked() -> None:
    for wrong in ({"threshold": 2.0}, {"temperature": 0.0}, {"steps": -1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            GPrune(**wrong)  # type: ignore[arg-type]
