"""The pixels methods: the worked examples of their rules, the rules as loops, exact counts, what stands for what."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from tests.methods.pixels.loops import best, flood, loco, run_lengths
from tokprune.errors import OptionError
from tokprune.methods.pixels.blank import Blank, regions
from tokprune.methods.pixels.pixelprune import PixelPrune
from tokprune.methods.pixels.rlt import RLT
from tokprune.methods.pixels_base import PixelMethod, PixelUnits
from tokprune.registry import get_method, list_methods

ALL = list_methods("pixels")


def units(x: Tensor) -> PixelUnits:
    """(t, h, w, P) with the same value in three channels as one clip of single frames."""
    t, h, w, p = x.shape
    return PixelUnits(x.reshape(1, t * h * w, 1, 1, p).expand(-1, -1, -1, 3, -1).float(), (t, h, w))


def grid(h: int, w: int, values: int = 4, levels: int = 3, seed: int = 0) -> Tensor:
    """(h, w, P) of few levels in blocks, so that much repeats."""
    chance = torch.Generator().manual_seed(seed)
    small = torch.randint(0, levels, (-(-h // 2), -(-w // 3), 1), generator=chance).float() / 4
    x = small.repeat_interleave(2, 0).repeat_interleave(3, 1)[:h, :w].repeat(1, 1, values)
    x[torch.rand(h, w, generator=chance) < 0.2] += torch.rand(values, generator=chance)
    return x


def kept(method: PixelMethod, x: Tensor, keeps: list[int] | None = None) -> Tensor:
    return method.choose(units(x[None]), keeps).kept.view(x.shape[:2])


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (6, 2)])
def test_a_rectangle_on_a_plain_ground_keeps_four_units(size: tuple[int, int]) -> None:
    x = torch.zeros(9, 10, 5)
    x[2 : 2 + size[0], 3 : 3 + size[1]] = 1
    expected = {(0, 0), (2, 3), (2, 3 + size[1]), (2 + size[0], 3)}
    assert {tuple(at) for at in kept(PixelPrune(), x).nonzero().tolist()} == expected


def test_plain_different_and_chequered_pictures() -> None:
    assert int(kept(PixelPrune(), torch.full((7, 5, 4), 0.3)).sum()) == 1
    assert kept(PixelPrune(), torch.arange(35.0).view(7, 5, 1) / 64).all()
    chequered = ((torch.arange(6)[:, None] + torch.arange(7)) % 2).float()[..., None]
    assert kept(PixelPrune(), chequered).all()


def test_anchored_tolerance_does_not_let_a_gradient_creep() -> None:
    gradient = (torch.arange(12.0) * 0.03).view(1, 12, 1)
    assert kept(PixelPrune(threshold=0.05), gradient).flatten().tolist() == [True, False] * 6
    assert int(kept(PixelPrune(threshold=0.05, anchored=False), gradient).sum()) == 1


@pytest.mark.parametrize("metric", ["max", "mean", "rms"])
def test_pixelprune_is_its_rule_written_as_a_loop(metric: str) -> None:
    for threshold, anchored, seed in product((0.0, 0.1, 0.3), (True, False), range(4)):
        h, w = [(7, 9), (1, 8), (8, 1), (5, 5)][seed]
        x = grid(h, w, seed=seed)
        method = PixelPrune(threshold=threshold, metric=metric, anchored=anchored)  # type: ignore[arg-type]
        expected, error = loco(x, threshold, metric, anchored)
        found = method.predict(units(x[None]), False)
        assert torch.equal(kept(method, x), expected), (threshold, anchored, seed)
        torch.testing.assert_close(found.distance.view(h, w), error)
        count = max(1, h * w // 3)
        _, own = loco(x, threshold, metric, anchored=False)
        assert torch.equal(kept(method, x, [count]), best(own, count))


def test_a_batch_is_its_pictures_one_by_one_and_a_clip_its_frames() -> None:
    pictures = [grid(6, 7, seed=s) for s in range(3)]
    for method in (PixelPrune(threshold=0.1), PixelPrune(threshold=0.1, scan="raster", anchored=False), Blank()):
        alone = torch.cat([method.choose(units(x[None])).kept for x in pictures])
        together = PixelUnits(torch.cat([units(x[None]).values for x in pictures]), (1, 6, 7))
        assert torch.equal(method.choose(together).kept, alone)
        assert torch.equal(method.choose(units(torch.stack(pictures))).kept.view(3, -1), alone)


def test_raster_compares_with_the_unit_before() -> None:
    assert PixelPrune(scan="raster").anchored  # at threshold 0 the one before is the one that stands for it
    x = grid(5, 6, seed=1)
    flat = x.flatten(0, 1)
    same = torch.cat([torch.tensor([False]), (flat[1:] - flat[:-1]).abs().amax(-1) <= 0.1])
    assert torch.equal(kept(PixelPrune(threshold=0.1, scan="raster", anchored=False), x).flatten(), ~same)
    with pytest.raises(OptionError, match="anchored=False"):
        PixelPrune(threshold=0.1, scan="raster")


@pytest.mark.parametrize("anchored", [True, False])
def test_rlt_is_its_rule_written_as_a_loop(anchored: bool) -> None:
    chance = torch.Generator().manual_seed(3)
    fade = torch.linspace(0, 0.5, 6).view(6, 1, 1, 1, 1)  # slower than the threshold from patch to patch
    x = torch.rand(1, 12, 2, 3, 4, generator=chance) * 0.02 + fade * (
        torch.rand(1, 12, 1, 1, 1, generator=chance) < 0.7
    )
    x[4:, 3:6] += 0.6
    values = x.reshape(1, 72, 2, 3, 4)
    got = RLT(anchored=anchored).choose(PixelUnits(values, (6, 3, 4)))
    flat = x.view(6, 12, 2, 12)
    expected = run_lengths(flat[:, :, 0], flat[:, :, 1], 0.1, anchored)
    assert torch.equal(got.kept.view(6, 12), expected)
    assert expected[0].all()
    assert not expected.all()
    if anchored:
        assert expected.sum() > run_lengths(flat[:, :, 0], flat[:, :, 1], 0.1, False).sum(), "the fade would be lost"


def test_rlt_sources_are_the_last_kept_unit_of_the_place() -> None:
    x = torch.zeros(4, 1, 2, 3)
    x[2:, 0, 1] = 1
    choice = RLT().choose(units(x))
    assert choice.kept.view(4, 2).tolist() == [[True, True], [False, False], [False, True], [False, False]]
    assert choice.source.view(4, 2).tolist() == [[0, 1], [0, 1], [0, 5], [0, 5]]
    few = RLT().choose(units(x), [1])
    assert few.kept.flatten().nonzero().flatten().tolist() == [1], "the place that changes comes first"
    few = RLT().choose(units(x[1:3]), [1])  # in a clip of two patches, too
    assert few.kept.flatten().nonzero().flatten().tolist() == [1]
    assert RLT().choose(units(x[:1]), [2]).kept.all()


def test_rlt_at_its_threshold_is_a_repeat_and_no_anchor() -> None:
    x = torch.tensor([0.0, 0.25, 0.5, 0.5]).view(4, 1, 1, 1).expand(4, 1, 1, 3)
    choice = RLT(threshold=0.25).choose(units(x))
    assert choice.kept.flatten().tolist() == [True, False, True, False]
    assert choice.source.flatten().tolist() == [0, 0, 2, 2]


def test_blank_is_a_flood_fill() -> None:
    for seed in range(6):
        x = grid(8, 9, levels=2, seed=seed)
        plain = x.amax(-1) == x.amin(-1)
        label = flood(plain, x.mean(-1, keepdim=True), 0.0)
        choice = Blank().choose(units(x[None]))
        assert torch.equal(choice.source.view(8, 9), label)
        assert torch.equal(choice.kept.view(8, 9), label == torch.arange(72).view(8, 9))
    spiral = torch.ones(9, 9)
    for r, c in [
        (1, slice(0, 8)),
        (7, slice(1, 8)),
        (slice(3, 7), 1),
        (3, slice(1, 6)),
        (slice(4, 6), 5),
        (5, slice(3, 5)),
    ]:
        spiral[r, c] = 0
    assert torch.equal(
        Blank().choose(units(spiral[None, ..., None])).source.view(9, 9),
        flood(torch.ones(9, 9, dtype=torch.bool), spiral[..., None], 0.0),
    )


def test_a_busy_unit_parts_plain_ones_of_its_mean_colour() -> None:
    plain = torch.tensor([[[True, False, True], [False, False, True], [True, True, True]]])
    label = regions(plain, torch.full((1, 3, 3, 2), 0.5), 0.1)
    assert label.view(3, 3).tolist() == [[0, 1, 2], [3, 4, 2], [2, 2, 2]]


def test_blank_keeps_regions_first_then_what_is_least_plain() -> None:
    x = torch.zeros(2, 4, 2)
    x[0, 3], x[1, 3, 0], x[1, 2, 0] = 1, 0.2, 0.5  # a lone plain unit, and two that are not plain
    places = [kept(Blank(), x, [n]).flatten().nonzero().flatten().tolist() for n in (1, 2, 3)]
    assert places == [[0], [0, 6], [0, 6, 7]]


@pytest.mark.parametrize("name", ALL)
def test_counts_are_exact_and_chains_end_at_kept_units(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, PixelMethod)
    x = torch.stack([grid(4, 5, seed=s) for s in range(3)])
    candidates = torch.arange(60)[None] % 7 != 0
    for count in (1, 2, 7, 30, 60):
        choice = method.choose(units(x), [count])
        assert int(choice.kept.sum()) == count
        ends = choice.source[choice.source >= 0]
        assert choice.kept[0, ends].all()
        own = torch.arange(60)[choice.kept[0]]
        assert torch.equal(choice.source[0][choice.kept[0]], own)
        if count < candidates.sum():
            assert not method.choose(units(x), [count], candidates).kept[~candidates].any()
    free = method.choose(units(x))
    assert free.kept.any()
    assert (free.source >= 0).all(), "whatever the threshold drops, something kept stands for it"


@pytest.mark.parametrize("name", ALL)
def test_dropped_units_are_within_the_threshold_of_what_stands_for_them(name: str) -> None:
    method = get_method(name, threshold=0.1)
    assert isinstance(method, PixelMethod)
    given = units(torch.stack([grid(5, 6, seed=s) for s in range(4)]))
    source = method.choose(given).source
    values = given.values.flatten(2)
    error = (values - values.gather(1, source[..., None].expand_as(values))).abs()
    if name == "blank":  # of neighbours, not of the whole region
        return
    assert float((error.amax(-1) if name == "pixelprune" else error.mean(-1)).max()) <= 0.1 + 1e-6


@pytest.mark.parametrize("name", ALL)
def test_units_with_nan_stay(name: str) -> None:
    x = torch.zeros(1, 3, 4, 2)
    x[0, 1, 2, 0] = torch.nan
    if name == "rlt":
        x = torch.cat([torch.zeros_like(x), x])
    method = get_method(name)
    assert isinstance(method, PixelMethod)
    assert method.choose(units(x)).kept.view(x.shape[:3])[-1, 1, 2]


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"threshold": -0.1}, {"metric": "median"}, {"std": (0.0,)}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        get_method("pixelprune", **options)
