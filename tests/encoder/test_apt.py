"""APT's patch sizes: entropy, quadtree, what enters the first block, and whole towers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.encoder.all_towers import TOWERS, output, pixels, timm_vit
from tests.golden_vectors import GoldenCase, claims
from tokprune.adapters.patch_sizes import positions
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.encoder.apt import APT, leaders, patch_count, patch_entropy, patch_levels, shifted_levels
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, picture

close = torch.testing.assert_close
NORMAL = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def half_plain(seed: int = 0) -> Tensor:
    """(1, 3, 32, 32) levels: noise on the left, one colour on the right."""
    noise = torch.randint(0, 256, (1, 1, 32, 32), generator=torch.Generator().manual_seed(seed)).float()
    noise[..., 16:] = 90.0
    return noise.expand(-1, 3, -1, -1).clone()


def normalised(levels: Tensor) -> Tensor:
    return (levels / 255 - 0.5) / 0.25


def test_entropy_is_that_of_the_histogram() -> None:
    levels = half_plain()
    got = patch_entropy(levels, 4, 1)[0]
    grey = 0.2989 * levels[0, 0] + 0.5870 * levels[0, 1] + 0.1140 * levels[0, 2]
    for row in range(4):
        for col in range(4):
            block = grey[8 * row : 8 * row + 8, 8 * col : 8 * col + 8]
            counts = torch.histc(block, bins=512, min=0, max=255)
            share = counts[counts > 0] / 64
            assert got[row, col].item() == pytest.approx(-(share * share.log2()).sum().item(), abs=1e-4)
    assert (got[:, 2:].abs() < 1e-4).all()
    assert (got[:, :2] > 5).all()
    exact = torch.arange(256.0).view(1, 1, 16, 16).expand(-1, 3, -1, -1)
    back = (normalised(exact) * 0.25 + 0.5) * 255
    close(patch_entropy(back, 8, 1), patch_entropy(exact, 8, 1), atol=1e-3, rtol=0)
    assert patch_entropy(exact, 8, 1).item() == pytest.approx(8, abs=0.05)


@claims("apt", anchor="levels")
def test_golden(case: GoldenCase) -> None:
    """Entropies of the published data loader on a coloured picture, from its levels and from its normalised pixels."""
    levels = case["levels"].float()[None]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    back = ((levels / 255 - mean) / std * std + mean) * 255
    for level in (1, 2):
        for given in (levels, back):
            close(patch_entropy(given, case.number("side"), level)[0], case[f"entropy{level}"], atol=1e-5, rtol=0)
    entropies = [case["entropy1"][None], case["entropy2"][None]]
    sizes = patch_levels(entropies, case["thresholds"][None], tuple(case["sizes"].shape))  # type: ignore[arg-type]
    assert torch.equal(sizes[0], case["sizes"])


def test_positions_are_resampled_as_timm_does() -> None:
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(8 * 8, 5, generator=torch.Generator().manual_seed(1))
    expected = resample_abs_pos_embed(table[None], new_size=[4, 4], num_prefix_tokens=0)
    close(positions(table, (8, 8), 2), expected, atol=1e-6, rtol=0)


def test_borders_that_no_large_patch_fits_in_stay_small() -> None:
    entropy = patch_entropy(torch.zeros(1, 3, 20, 28), 4, 1)
    assert entropy.shape == (1, 2, 3)
    levels = patch_levels([entropy], torch.tensor([[5.5]]), (5, 7))
    assert levels[0, :4, :6].eq(1).all()
    assert levels[0, 4].eq(0).all()
    assert levels[0, :, 6].eq(0).all()


def test_the_largest_plain_patch_wins() -> None:
    two = torch.full((1, 4, 4), 9.0)
    two[0, 0, 0] = two[0, 2, 2] = 0.0
    four = torch.tensor([[[9.0, 0.0], [9.0, 9.0]]])
    levels = patch_levels([two, four], torch.tensor([[5.0, 4.0]]), (8, 8))[0]
    assert levels[:2, :2].eq(1).all()
    assert levels[4:6, 4:6].eq(1).all()
    assert levels[:4, 4:].eq(2).all()
    assert (levels == 0).sum() == 64 - 8 - 16
    assert patch_count(levels[None]).item() == 64 - 2 * 3 - 15
    heads = leaders(levels[None])[0]
    assert heads.unique().numel() == 64 - 2 * 3 - 15
    assert heads.view(8, 8)[:4, 4:].unique().item() == 8 * 1 + 5  # left above the middle of the 4 x 4 cells
    assert heads.view(8, 8)[:2, :2].unique().item() == 0
    assert leaders(torch.full((1, 8, 8), 3)).unique().item() == 8 * 3 + 3


@pytest.mark.parametrize("target", [20, 33, 49, 63])
@pytest.mark.parametrize("apart", [0.5, 0.0])
def test_a_target_takes_the_plainest_patches_first(target: int, apart: float) -> None:
    """Equal ones one by one, the first ones first."""
    entropy = torch.randperm(16, generator=torch.Generator().manual_seed(1)).float().view(1, 4, 4) * apart
    levels = shifted_levels([entropy], torch.tensor([[5.5]]), (8, 8), target)
    joined = math.ceil((64 - target) / 3)
    assert patch_count(levels).item() == 64 - 3 * joined
    expected = entropy.flatten().argsort(stable=True)[:joined].sort().values
    got = (levels[0, ::2, ::2].flatten() == 1).nonzero()[:, 0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["timm", "timm registers", "timm average", "clip", "siglip", "open_clip"])
@torch.no_grad()
def test_what_enters_is_what_the_model_would_make_of_the_small_picture(name: str) -> None:
    """All plain: the tower runs as it would on the picture at half its size with resampled positions."""
    model = TOWERS[name]()
    x = torch.full((2, 3, 32, 32), 0.3) + torch.tensor([0.0, 0.2]).view(2, 1, 1, 1)
    seen: list[Tensor] = []
    pruning = apply_encoder(model, APT(proportional=False, **NORMAL))
    first = pruning.encoder.tower.blocks[0].block
    watch = first.register_forward_pre_hook(lambda m, a, kw: seen.append(a[0]), with_kwargs=True)
    output(model, x)
    watch.remove(), pruning.remove()
    prefix = pruning.encoder.tower.prefix
    assert seen[0].shape[1] == 16 + prefix
    table = {
        "timm": lambda: model.pos_embed[0, 1:],
        "timm registers": lambda: model.pos_embed[0, 5:],
        "timm average": lambda: model.pos_embed[0],
        "clip": lambda: model.embeddings.position_embedding.weight[1:],
        "siglip": lambda: model.embeddings.position_embedding.weight,
        "open_clip": lambda: model.positional_embedding[1:],
    }[name]()
    small = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    place = torch.nn.functional.interpolate(table.T.reshape(1, -1, 8, 8), size=(4, 4), mode="bicubic", antialias=True)
    expected = (pruning.encoder.tower.patch(small) + place).flatten(2).transpose(1, 2)
    norm = {"clip": lambda t: model.pre_layrnorm(t), "open_clip": lambda t: model.ln_pre(t)}.get(name, lambda t: t)
    close(seen[0][:, prefix:], norm(expected), atol=1e-5, rtol=1e-5)
    assert pruning.trace.merge_map(0).unique().numel() == 16
    assert torch.equal(pruning.trace.size.sum(1), torch.full((2,), 64.0))


@torch.no_grad()
def test_nothing_plain_is_bit_identical() -> None:
    for name in ("timm", "clip", "siglip"):
        model = TOWERS[name]()
        x = normalised(torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float())
        plain = output(model, x)
        with apply_encoder(model, APT(thresholds=(2.0,), **NORMAL)):
            assert all(torch.equal(a, b) for a, b in zip(output(model, x), plain, strict=True))


@pytest.mark.parametrize("embed", ["resize", "mean"])
@pytest.mark.parametrize("name", ["timm", "timm average", "timm map", "siglip"])
@torch.no_grad()
def test_a_busy_neighbour_changes_nothing(name: str, embed: Any) -> None:
    """Pictures of one batch keep different counts; padding is not seen, and pooling weighs by area."""
    model = TOWERS[name]()
    noise = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(3)).float()
    x = normalised(torch.cat([half_plain(), noise, torch.full_like(noise, 7.0)]))
    with apply_encoder(model, APT(thresholds=(5.0, 4.0), embed=embed, **NORMAL)) as pruning:
        both = output(model, x)[-1]
        assert pruning.trace.survivor.sum(1).tolist() == [32 + 2, 64, 4]
        alone = torch.cat([output(model, x[i : i + 1])[-1] for i in range(3)])
    close(both, alone, atol=1e-5, rtol=1e-5)
    close(both[1:2], output(model, x[1:2])[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mean_embeds_the_mean() -> None:
    model, seen = timm_vit(), []
    with apply_encoder(model, APT(thresholds=(5.0,), embed="mean", **NORMAL)) as pruning:
        watch = model.blocks[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        model(normalised(half_plain()))
        watch.remove()
        assign = pruning.trace.assign[0]
    full: list[Tensor] = []
    watch = model.blocks[0].register_forward_pre_hook(lambda m, a: full.append(a[0]))
    model(normalised(half_plain()))
    watch.remove()
    for row in range(40):
        close(seen[0][0, 1 + row], full[0][0, 1:][assign == row].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@torch.no_grad()
def test_a_ratio_is_kept_to_within_one_large_patch(ratio: float) -> None:
    model = timm_vit()
    with apply_encoder(model, APT(**NORMAL), ratio=ratio) as pruning:
        model(pixels(3))
    left = pruning.trace.survivor.sum(1)
    target = tokprune.budget.kept(64, ratio)
    assert (left <= target).all()
    assert (left > target - 3).all()


@torch.no_grad()
def test_feature_maps_and_gradients() -> None:
    model = timm_vit()
    x = normalised(half_plain())
    with apply_encoder(model, APT(thresholds=(5.0,), **NORMAL)):
        maps = model.forward_intermediates(x, [1], intermediates_only=True)
        assert maps[0].shape == (1, 24, 8, 8)
        with torch.enable_grad():
            model(x).sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_in_a_vlm_the_processor_tells_the_levels_and_large_patches_are_one_token() -> None:
    tiny = build("llava")
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), "?"]])
    plain = tiny.model(**inputs).logits
    with pytest.raises(OptionError, match="image_mean"), tokprune.apply(tiny.model, "apt", ratio=0.6):
        tiny.model(**inputs)
    with tokprune.apply(tiny.model, "apt", ratio=0.6, processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        stream = pruning.last.streams[0]
    assert stream.kept == int(pruning.encoder.trace.survivor.sum()) < stream.total
    assert torch.equal(tiny.model(**inputs).logits, plain)


def test_refusals() -> None:
    for family in ("internvl", "qwen2_5_vl", "idefics3"):
        with pytest.raises(UnsupportedModelError, match="absolute positions"):
            apply_encoder(build(family).model, "apt")
    for options, message in (
        ({"thresholds": ()}, "non-empty tuple"),
        ({"embed": "middle"}, "resize"),
        ({"mean": (0.5,)}, "go together"),
    ):
        with pytest.raises(OptionError, match=message):
            APT(**options)  # type: ignore[arg-type]
    model = timm_vit()
    apply_encoder(model, APT(**NORMAL), budget=8)
    with pytest.raises(OptionError, match="at least 16 are left"):
        model(pixels())
