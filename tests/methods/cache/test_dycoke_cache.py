"""The decision of DyCoke's cache pruning as a function of attention rows."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.errors import OptionError
from tokprune.methods.cache.dycoke_cache import DyCokeCache, attention_moved
from tokprune.methods.cache_base import CacheStep, largest


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def test_the_largest_in_order_with_ties_to_the_lower_index() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.4, 0.2, 0.4], [0.5, 0.0, 0.5, 0.0, 0.0]])
    assert largest(attention, torch.tensor([2, 2]), 2).tolist() == [[1, 2], [0, 2]]


def test_rows_with_fewer_keys_end_in_filler() -> None:
    """The second row has three real keys; its zeros behind them are never chosen."""
    attention = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.3, 0.0, 0.1, 0.0]])
    assert largest(attention, torch.tensor([3, 1]), 3).tolist() == [[1, 2, 3], [0, -1, -1]]
    assert largest(attention[1:, :], torch.tensor([3]), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("angle", "moved"), [(0.0, False), (20.0, False), (30.0, True), (90.0, True)])
def test_attention_moves_when_the_cosine_falls_below(angle: float, moved: bool) -> None:
    turn = torch.deg2rad(torch.tensor(angle))
    before, after = row(2.0, 0.0), torch.stack([turn.cos(), turn.sin()])[None] * 0.1
    assert bool(attention_moved(after, before, 0.9)) == moved


def test_attention_of_nothing_has_not_moved() -> None:
    assert not bool(attention_moved(row(0.0, 0.0), row(0.0, 0.0), 0.9))


def steps(method: DyCokeCache, rows: list[torch.Tensor], keep: int) -> list[CacheStep]:
    before, out = None, []
    for attention in rows:
        before = method.step(attention, torch.full((len(attention),), keep), keep, before)
        out.append(before)
    return out


SLOW = [row(0.5, 0.3, 0.1, 0.1), row(0.45, 0.25, 0.28, 0.02), row(0.0, 0.0, 0.5, 0.5), row(0.0, 0.1, 0.4, 0.5)]


def test_the_earlier_set_stays_while_attention_is_alike() -> None:
    """Step two would choose {0, 2} by itself, step three does move."""
    chosen = [s.indices[0].tolist() for s in steps(DyCokeCache(), SLOW, 2)]
    assert chosen == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_the_published_code_reads_all_instead() -> None:
    chosen = [s.indices[0].tolist() for s in steps(DyCokeCache(compat="published"), SLOW, 2)]
    assert chosen == [[0, 1], [0, 1, 2, 3], [2, 3], [0, 1, 2, 3]]


def test_rows_decide_for_themselves() -> None:
    rows = [torch.cat([SLOW[i], SLOW[j]]) for i, j in ((0, 0), (1, 2))]
    second = steps(DyCokeCache(), rows, 2)[1].indices
    assert second.tolist() == [[0, 1], [2, 3]]
    second = steps(DyCokeCache(compat="published"), rows, 2)[1].indices
    assert second.tolist() == [[0, 1, 2, 3], [2, 3, -1, -1]]


def test_comparison_is_with_the_step_before_not_with_the_choice() -> None:
    """Attention that drifts slowly keeps its first set however far it gets: the published comparison."""
    drift = [row(float(torch.cos(a)), float(torch.sin(a))) for a in torch.deg2rad(torch.arange(0.0, 91.0, 18.0))]
    assert [s.indices[0].tolist() for s in steps(DyCokeCache(), drift, 1)] == [[0]] * len(drift)


def test_beams_pick_rows() -> None:
    step = DyCokeCache().step(torch.cat([SLOW[0], SLOW[2]]), torch.tensor([2, 2]), 2, None)
    turned = step.index(lambda t: t[[1, 1, 0]])
    assert turned.indices.tolist() == [[2, 3], [2, 3], [0, 1]]
    assert torch.equal(turned.attention[2], SLOW[0][0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 0}, "layer=0"),
        ({"layer": True}, "layer=True"),
        ({"pruning_rate": 1.0}, "pruning_rate=1.0"),
        ({"pruning_rate": float("nan")}, "pruning_rate"),
        ({"similarity": 1.5}, "similarity=1.5"),
        ({"compat": "publishd"}, "published"),
        ({"rate": 0.7}, "pruning_rate"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        tokprune.get_method("dycoke_cache", **options)


def test_it_is_listed_and_round_trips() -> None:
    assert "dycoke_cache" in tokprune.list_methods(stage="cache")
    from tokprune.config import PruneConfig

    config = PruneConfig.build(["dycoke", tokprune.get_method("dycoke_cache", layer=5)], ratio=0.3)
    assert PruneConfig.from_dict(config.to_dict()) == config
    assert PruneConfig.build("dycoke_cache").ratio is None
