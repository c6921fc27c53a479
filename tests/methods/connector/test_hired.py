"""HiRED: published counts, masks and packing; and the corrected budgets, which are exact and look at regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden_vectors import GoldenCase, claims
from tests.published.attention import cls_row
from tokprune.errors import OptionError
from tokprune.methods.base import deferred_checks
from tokprune.methods.connector.hired import HiRED, hired_budgets, hired_published_budgets
from tokprune.ops.topk import top
from tokprune.testing import StandInDevice, device
from tokprune.tokens import Layout, VisualTokens


def tiled(side: int, canvas: tuple[int, int]) -> Layout:
    """A thumbnail and full tiles of side x side tokens."""
    return Layout.grid(side, side, 1 + canvas[0] * canvas[1], "tiles", canvas=canvas, thumbnail=True)


def published_packing(features: Tensor, mask: Tensor, grid_hw: Tensor, size_hw: Tensor) -> Tensor:
    """The published packing with its swapped canvas: thumbnail first, then the un-padded canvas in raster order."""
    side = int(mask.shape[1] ** 0.5)
    down, across = int(grid_hw[1]), int(grid_hw[0])  # swapped upstream
    height, width = down * side, across * side

    def lay(x: Tensor) -> Tensor:
        return x.reshape(down, across, side, side, -1).transpose(1, 2).reshape(height, width, -1)

    canvas, kept = lay(features[1:]), lay(mask[1:])[..., 0].bool()
    tall, wide = (int(v) for v in size_hw)
    if wide / tall > width / height:
        pad = (height - int(tall * (width / wide))) // 2
        canvas, kept = canvas[pad : height - pad], kept[pad : height - pad]
    else:
        pad = (width - int(wide * (height / tall))) // 2
        canvas, kept = canvas[:, pad : width - pad], kept[:, pad : width - pad]
    return torch.cat([features[0][mask[0].bool()], canvas[kept]])


@claims("hired", anchor="cls_attn_final", unused={"num_heads": "of q and k, which not all cases hold"})
def test_golden(case: GoldenCase) -> None:
    late = case["cls_attn_final"]
    tiles, _, n = late.shape
    for row in ("init", "final"):
        if f"q_{row}" in case:
            ours = cls_row(case[f"q_{row}"], case[f"k_{row}"], int(case.number("num_heads")))
            torch.testing.assert_close(ours, case[f"cls_attn_{row}"], atol=1e-6, rtol=1e-4)
    if "cls_attn_init" not in case:  # LLaVA-1.5: one tile, its top tokens
        keep = int(n * case.number("rate"))
        assert torch.equal(top(late.mean(1), keep)[0], case["kept_sorted"])
        tokens = VisualTokens(torch.zeros(n, 2), Layout.line(n), dict.fromkeys(HiRED().needs, late.mean(1)[0]))
        assert torch.equal(HiRED().select(tokens, keep).indices, case["kept_sorted"])
        return
    alpha, rate = case.number("alpha"), case.number("rate")
    total = int(tiles * n * rate)
    early = case["cls_attn_init"].mean(1)
    budgets = hired_published_budgets(early[0], tiles - 1, total, alpha)
    assert torch.equal(budgets[1:], case["sub_budgets"])
    assert torch.equal(budgets, case["tokens_per_tile"])

    down, across = (int(v) for v in case["grid_hw"])
    side = int(n**0.5)
    tokens = VisualTokens(
        case["features"].flatten(0, 1),
        tiled(side, (down, across)),
        {"cls_attention": late.mean(1).flatten(), "cls_attention:0": early.flatten()},
    )
    chosen = HiRED(alpha=alpha, compat="published").select(tokens, total).indices
    mask = torch.zeros(tiles * n, dtype=torch.long).index_fill(0, chosen, 1).reshape(tiles, n)
    assert torch.equal(mask, case["mask"])
    if "packed" in case:
        packed = published_packing(case["features"], mask, case["grid_hw"], case["orig_size_hw"])
        assert torch.equal(packed, case["packed"])
        assert len(packed) == case["packed_len"]
    # The corrected rule keeps the whole budget on the same input.
    assert len(HiRED(alpha=alpha).select(tokens, total)) == total


def test_regions_are_quadrants_not_bands() -> None:
    side = 24
    early = torch.full((5 * side * side,), 0.0)
    early.view(5, side, side)[0, :12, :12] = 1.0  # all content top left
    assert hired_budgets(early, tiled(side, (2, 2)), 576).tolist() == [288, 288, 0, 0, 0]
    published = hired_published_budgets(early[: side * side], 4, 576, alpha=0.75)  # 144 hits = the quadrant
    assert published.tolist() == [432, 72, 72, 0, 0]


@pytest.mark.parametrize("canvas", [(1, 2), (2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("keep", [1, 2, 7, 100, 251])
def test_corrected_budgets_are_exact(canvas: tuple[int, int], keep: int) -> None:
    layout = tiled(12, canvas)
    n = layout.num_groups * 144
    early = torch.rand(n, generator=torch.Generator().manual_seed(keep))
    budgets = hired_budgets(early, layout, min(keep, n))
    assert int(budgets.sum()) == min(keep, n)
    assert int(budgets.max()) <= 144


def test_what_full_tiles_cannot_take_flows_on() -> None:
    layout = tiled(4, (1, 2))
    early = torch.zeros(48)
    early.view(3, 4, 4)[0, :, :2] = 1.0  # the left tile gets everything it can hold
    assert hired_budgets(early, layout, 40).tolist() == [16, 16, 8]
    assert hired_budgets(early, layout, 48).tolist() == [16, 16, 16]
    assert hired_budgets(early, layout, 44, alpha=0.1).tolist() == [12, 16, 16]


def test_frames_share_equally_and_plain_images_take_the_top() -> None:
    late = torch.arange(12.0)
    video = VisualTokens(torch.zeros(12, 2), Layout.grid(2, 2, 3, "video"), dict.fromkeys(HiRED().needs, late))
    assert HiRED().select(video, 6).indices.tolist() == [2, 3, 6, 7, 10, 11]
    image = VisualTokens(torch.zeros(12, 2), Layout.grid(3, 4), dict.fromkeys(HiRED().needs, late))
    assert HiRED().select(image, 3).indices.tolist() == [9, 10, 11]


def test_early_block_is_an_option_and_bad_values_are_refused() -> None:
    assert HiRED(init_layer=3).needs == ("cls_attention", "cls_attention:3")
    for options in ({"alpha": 1.5}, {"alpha": float("nan")}, {"compat": "official"}):
        with pytest.raises(OptionError):
            HiRED(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="does not divide"):
        hired_published_budgets(torch.rand(64), 3, 10)
    with pytest.raises(OptionError, match="divides by zero"):
        hired_published_budgets(torch.rand(64), 2, 100, alpha=1.0)


def test_tiles_without_their_canvas_are_refused() -> None:
    layout = Layout.grid(2, 2, 3, "tiles", thumbnail=True)
    tokens = VisualTokens(torch.zeros(12, 2), layout, dict.fromkeys(HiRED().needs, torch.rand(12)))
    with pytest.raises(OptionError, match="canvas"):
        HiRED().select(tokens, 4)


@pytest.mark.skipif(not device.AVAILABLE, reason="the stand-in device needs a newer torch")
def test_equal_streams_are_chosen_for_in_one_go_on_a_device() -> None:
    """What comes out is what each stream gets alone on a CPU; three alike cost hardly more launches than two."""
    method = HiRED()

    def stream(seed: int, tiles: bool) -> VisualTokens:
        layout = Layout.grid(6, 6, 5, "tiles", canvas=(2, 2), thumbnail=True) if tiles else Layout.grid(6, 6)
        draw = torch.Generator().manual_seed(seed)
        n = len(layout.group)
        rows = {name: torch.rand(n, generator=draw).softmax(0) for name in method.needs}
        return VisualTokens(torch.randn(n, 4, generator=draw), layout, rows)

    batch = [stream(i, tiles) for i, tiles in enumerate((True, False, True, False, True))]
    keeps = [20, 9, 20, 9, 31]
    alone = [method.select(tokens, keep).indices for tokens, keep in zip(batch, keeps, strict=True)]
    with StandInDevice() as stand_in:
        placed = [
            VisualTokens(stand_in.put(t.features), t.layout.to(stand_in.device), stand_in.put(dict(t.signals)))
            for t in batch
        ]
        found = method.select_batch(placed, keeps)
        assert all(torch.equal(a, f.indices.cpu()) for a, f in zip(alone, found, strict=True))
        launches = []
        for count in (2, 3):
            with stand_in.count() as counted, deferred_checks():
                method.select_batch([placed[0]] * count, [20] * count)
            launches.append(counted.launches)
        assert counted.syncs == 0
    assert launches[1] - launches[0] <= 12
