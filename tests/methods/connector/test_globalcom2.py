"""GlobalCom2 against the published tokens of a tiled image, and its exact-budget form."""

from __future__ import annotations

import torch

from tests.golden_vectors import GoldenCase, claims
from tests.published.globalcom2 import globalcom2_published, unpadded
from tokprune.methods.connector.globalcom2 import GlobalCom2, crop_scales, seen_at
from tokprune.tokens import Layout, VisualTokens


@claims("globalcom2", anchor="base_cls_attn")
def test_golden(case: GoldenCase) -> None:
    features, thumbnail, crops = case["features"], case["base_cls_attn"], case["crop_cls_attn"]
    across, down = case["grid_wh"].tolist()
    width, height = case["orig_size_wh"].tolist()
    newline = torch.full((features.shape[-1],), case.number("newline_value"))
    scales, kept, out = globalcom2_published(
        thumbnail,
        crops,
        features,
        (down, across),
        (width, height),
        newline,
        case.number("retention"),
        case.number("temperature"),
    )
    torch.testing.assert_close(scales, case["scales"], atol=1e-6, rtol=1e-5)
    assert torch.equal(kept, case["thumb_kept_order"])
    assert torch.equal(out, case["out_tokens"])


def tiled(seed: int = 0, side: int = 6, canvas: tuple[int, int] = (2, 2)) -> VisualTokens:
    groups = 1 + canvas[0] * canvas[1]
    layout = Layout.grid(side, side, groups, "tiles", canvas=canvas, thumbnail=True)
    logits = torch.randn(groups * side * side, generator=torch.Generator().manual_seed(seed))
    return VisualTokens(torch.zeros(len(logits), 2), layout, {"cls_logits:-1": logits})


def test_the_shares_follow_the_thumbnail_and_add_up() -> None:
    tokens = tiled()
    logits = tokens.signals["cls_logits:-1"]
    logits[:36].view(6, 6)[:3, 3:] += 3.0  # the thumbnail is interested in the upper right crop
    layout = tokens.layout
    for keep in (1, 2, 17, 45, 100, 179, 180):
        indices = GlobalCom2().select(tokens, keep).indices
        assert len(indices.unique()) == keep
    counts = torch.bincount(layout.group[GlobalCom2().select(tokens, 45).indices], minlength=5)
    scales = crop_scales(logits[:36].view(6, 6), (2, 2), 0.25)
    assert counts[2] == counts[1:].max() > 9
    assert (counts - 36 * torch.cat([torch.tensor([0.25]), scales])).abs().max() < 1


def test_the_thumbnail_points_at_tokens_of_the_crops() -> None:
    tokens = tiled()
    logits = tokens.signals["cls_logits:-1"]
    logits[:] = 0.01
    logits[1 * 6 + 4] = 5.0  # a bright cell of the thumbnail: rows 2-3, columns 2-3 of crop 1 (upper right)
    indices = GlobalCom2().select(tokens, 20).indices
    of_crop = indices[tokens.layout.group[indices] == 2] - 2 * 36
    assert {2 * 6 + 2, 2 * 6 + 3, 3 * 6 + 2, 3 * 6 + 3} <= set(of_crop.tolist())
    assert 10 in indices.tolist()


def test_without_a_thumbnail_every_group_keeps_the_same_ratio() -> None:
    logits = torch.randn(3 * 16, generator=torch.Generator().manual_seed(1))
    layout = Layout.grid(4, 4, 3, "video")
    indices = GlobalCom2().select(VisualTokens(torch.zeros(48, 2), layout, {"cls_logits:-1": logits}), 12).indices
    assert torch.bincount(layout.group[indices]).tolist() == [4, 4, 4]
    best = torch.cat([logits[g * 16 : g * 16 + 16].topk(4).indices.sort().values + g * 16 for g in range(3)])
    assert torch.equal(indices, best)


def test_the_thumbnail_is_laid_over_the_picture_not_over_its_padding() -> None:
    """The same as resizing it to the picture's size, at the places where the picture lies on the canvas."""
    thumbnail = torch.randn(12, 10, generator=torch.Generator().manual_seed(4))
    for rows, cols, first in ((14, 24, (5, 0)), (24, 17, (0, 3)), (7, 9, (8, 7)), (12, 10, (1, 2))):
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)) + torch.tensor(first)
        seen = seen_at(thumbnail, place, torch.tensor(first), torch.tensor([rows, cols]))
        resized = torch.nn.functional.interpolate(thumbnail[None, None], size=(rows, cols), mode="bilinear")
        torch.testing.assert_close(seen.view(rows, cols), resized[0, 0], atol=1e-5, rtol=1e-5)


@claims("globalcom2", anchor="base_cls_attn", part="scores and their ranks")
def test_the_method_ranks_as_published(case: GoldenCase) -> None:
    """Crop by crop the method's scores pick the published tokens, padding included, once each count is the published
    one."""
    across, down = case["grid_wh"].tolist()
    count, n, _ = case["features"].shape
    side = round(n**0.5)
    shown = torch.zeros(down * side, across * side, dtype=torch.bool)
    shown[unpadded((down * side, across * side), tuple(case["orig_size_wh"].tolist()))] = True
    visible = shown.view(down, side, across, side).transpose(1, 2).reshape(count, n)
    full = Layout.grid(side, side, count + 1, "tiles", canvas=(down, across), thumbnail=True)
    stay = torch.cat([torch.ones(n, dtype=torch.bool), visible.flatten()])
    layout = Layout(full.group[stay], full.row[stay], full.col[stay], full.grids, "tiles", (down, across), True)
    own = torch.cat([case["base_cls_attn"], case["crop_cls_attn"].flatten()])[stay]
    tokens = VisualTokens(torch.zeros(len(own), 2), layout, {"cls_logits:-1": own})
    scores = GlobalCom2().select(tokens, len(own) // 4).info["scores"]
    picked = torch.zeros(count * n, dtype=torch.bool)
    places = stay[n:].nonzero()[:, 0]
    for t, scale in enumerate(case["scales"].double().tolist()):
        mine = (layout.group == t + 1).nonzero()[:, 0]
        best = mine[scores[mine].topk(int(len(mine) * scale)).indices]
        picked[places[best - n]] = True
    ours = case["features"].flatten(0, 1)[picked].half().float()
    published = case["out_tokens"]
    published = published[(published != case.number("newline_value")).any(1)]  # in another order where crops are padded
    assert sorted(ours.tolist()) == sorted(published.tolist())


def test_unpadded_tiles_have_holes() -> None:
    tokens = tiled()
    shown = (
        (tokens.layout.group == 0)
        | ((tokens.layout.group <= 2) & (tokens.layout.row >= 2))
        | ((tokens.layout.group >= 3) & (tokens.layout.row < 4))
    )
    part = tokens.part(shown.nonzero()[:, 0])
    lay = part.layout
    layout = Layout(lay.group, lay.row, lay.col, tokens.layout.grids, "tiles", (2, 2), True)
    holey = VisualTokens(part.features, layout, part.signals)
    for keep in (1, 33, len(holey)):
        assert len(GlobalCom2().select(holey, keep).indices.unique()) == keep


def test_unpadding_cuts_the_longer_margin() -> None:
    assert unpadded((24, 24), (672, 336)) == (slice(6, 18), slice(0, 24))
    assert unpadded((24, 24), (336, 672)) == (slice(0, 24), slice(6, 18))
    assert unpadded((12, 24), (200, 100)) == (slice(0, 12), slice(0, 24))
