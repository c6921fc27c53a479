"""DToP against a forward written out: decided tokens stop, the others run on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.encoder.all_towers import pixels, timm_vit
from tests.encoder.test_vlm_towers import encode, two_images
from tests.encoder.written_out import attend, seen_by_blocks, think
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.encoder.dtop import DToP, undecided
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build

close = torch.testing.assert_close


def test_decided_tokens_stop_but_for_the_surest_of_each_class() -> None:
    """Class 0: .95 .99 .97 .5 .93 (one undecided); class 1: .92, .92. Two of each class stay as context."""
    first = torch.tensor([[0.95, 0.99, 0.97, 0.5, 0.93, 0.08, 0.08]])
    chances = torch.stack([first, 1 - first], -1)
    chances[0, 3] = torch.tensor([0.55, 0.45])
    assert undecided(chances, 0.9, 2)[0].tolist() == [False, True, True, True, False, True, True]
    assert undecided(chances, 0.9, 1)[0].tolist() == [False, True, False, True, False, True, False]
    assert undecided(chances, 1.0, 0).all()


@torch.no_grad()
def test_dtop_freezes_decided_tokens_and_runs_the_others() -> None:
    model, x = timm_vit(), pixels()
    weight = torch.randn(24, 3, generator=torch.Generator().manual_seed(5))

    def head(patches: Tensor) -> Tensor:
        return (patches @ weight).softmax(-1)

    with apply_encoder(model, DToP(heads={1: head}, threshold=0.8, context=2)) as pruning:
        start, got = seen_by_blocks(model, pruning, x)
    blocks = list(model.blocks)
    then = start
    for block in blocks[:2]:
        then = think(block, attend(block, then))
    going = undecided(head(then[:, 1:]), 0.8, 2)
    assert 0 < going.sum() < going.numel()
    assert going.sum(1).unique().numel() == 2  # ragged: padding must not matter
    for b in range(2):
        stay = [0, *(going[b].nonzero()[:, 0] + 1).tolist()]
        now = then[b][stay][None]
        for block in blocks[2:]:
            now = think(block, attend(block, now))
        full = then[b].clone()
        full[stay] = now[0]
        close(got[b], full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_that_stop_at_the_second_head_keep_the_state_that_they_have_there() -> None:
    model, x = timm_vit(), pixels()
    weight = torch.randn(24, 3, generator=torch.Generator().manual_seed(5))

    def head(patches: Tensor) -> Tensor:
        return (patches @ weight).softmax(-1)

    with apply_encoder(model, "dtop", heads={0: head, 2: head}, threshold=0.85, context=1) as pruning:
        start, got = seen_by_blocks(model, pruning, x)
    blocks = list(model.blocks)
    then = think(blocks[0], attend(blocks[0], start))
    first = undecided(head(then[:, 1:]), 0.85, 1)
    for b in range(2):
        full = then[b].clone()
        stay = [0, *(first[b].nonzero()[:, 0] + 1).tolist()]
        now = then[b][stay][None]
        for block in blocks[1:3]:
            now = think(block, attend(block, now))
        full[stay] = now[0]
        second = undecided(head(now[:, 1:]), 0.85, 1)[0]
        assert 0 < second.sum() < len(second) < first.shape[1]
        on = [0, *(second.nonzero()[:, 0] + 1).tolist()]
        now = now[:, on]
        for block in blocks[3:]:
            now = think(block, attend(block, now))
        full[[stay[i] for i in on]] = now[0]
        close(got[b], full, atol=2e-5, rtol=1e-5)


def test_a_packed_tower_takes_one_head() -> None:
    tiny = build("qwen3_vl")
    weight = torch.randn(4 * tiny.model.base_model.visual.config.hidden_size, 3)

    def head(patches: Tensor) -> Tensor:
        return (patches @ weight).softmax(-1)

    with apply_encoder(tiny.model, "dtop", heads={0: head}, threshold=0.5):
        assert encode(tiny, two_images(tiny))[0].isfinite().all()
    with (
        apply_encoder(tiny.model, "dtop", heads={0: head, 1: head}, threshold=0.5),
        pytest.raises(UnsupportedModelError, match="once, at one block"),
    ):
        encode(tiny, two_images(tiny))


def test_dtop_refuses_what_is_no_trained_head() -> None:
    with pytest.raises(OptionError, match="trained head"):
        apply_encoder(timm_vit(), "dtop")
    with pytest.raises(OptionError, match=r"block from 0 to 3.*blocks given: \[1, 9\]"):
        apply_encoder(timm_vit(), DToP(heads={1: torch.nn.Identity(), 9: torch.nn.Identity()}))
    with pytest.raises(OptionError, match="maps a block's number to a function"):
        DToP(heads={5: "head.pt"})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="ratio and budget out"):
        apply_encoder(timm_vit(), DToP(heads={1: torch.nn.Identity()}), ratio=0.5)
