"""MustDrop's merge of windows: the published output, pictures of a batch on their own, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import tokprune
from tests.encoder.test_towers import TOWERS, output, pixels
from tests.golden_vectors import GoldenCase, claims
from tests.golden_vectors import close as golden_close
from tokprune.budget import kept
from tokprune.errors import OptionError
from tokprune.methods.encoder.mustdrop_merge import MustDropMerge, window_similarity
from tokprune.methods.encoder_base import BlockView
from tokprune.registry import get_method
from tokprune.runtime.encoder import apply_encoder
from tokprune.testing import build, picture

close = torch.testing.assert_close


def view(x: Tensor, prefix: int = 1, target: int | None = None) -> BlockView:
    return BlockView(x, 0, 12, prefix, x.shape[1] - prefix, lambda: (x, x, x), 1.0, target)


@claims("mustdrop_spatial_merge", anchor="x")
def test_golden(case: GoldenCase) -> None:
    x = case["x"]
    prefix = x.shape[1] - case.number("side") ** 2
    found = [key for key in case if re.fullmatch(r"y_w\d+_t\d+", key)]
    assert found
    for key in found:
        window, threshold = map(int, re.findall(r"\d+", key))
        method = MustDropMerge(window=window, threshold=threshold / 100)
        out = method.reduce(view(x, prefix))
        if out is not None and len(x) > 1:  # published: all pictures of a batch merge as few windows as one of them
            out = method.reduce(view(x, prefix, target=int((out.rep >= 0).sum(1).amax()) - prefix))
        golden_close(x if out is None else out.x, case[key])
        assert torch.equal(torch.ones_like(x[..., :1]) if out is None else out.size, case[key.replace("y_", "size_")])


def test_similarity_is_the_mean_over_pairs() -> None:
    patches = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for b in range(2):
        for g in range(3):
            pairs = [
                torch.cosine_similarity(patches[b, g, i], patches[b, g, j], dim=0)
                for i in range(4)
                for j in range(4)
                if i != j
            ]
            torch.testing.assert_close(window_similarity(patches)[b, g], torch.stack(pairs).mean())


def test_pictures_of_a_batch_merge_on_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(1, 1, 6, generator=generator) + 0.01 * torch.randn(1, 50, 6, generator=generator)
    busy = torch.randn(1, 50, 6, generator=generator)
    method = MustDropMerge(window=3)
    alone, both = method.reduce(view(plain)), method.reduce(view(torch.cat([plain, busy])))
    assert method.reduce(view(busy)) is None
    assert alone is not None
    assert both is not None
    n = alone.x.shape[1]  # 7 x 7: four windows, 13 patches beyond them, [CLS]
    assert n == 1 + 4 + 13
    assert sorted(alone.rep[0, 1:5].tolist()) == [1 + 7 * r + c for r in (1, 4) for c in (1, 4)]  # the windows' middles
    assert torch.equal(both.x[0, :n], alone.x[0])
    assert (both.rep[0, n:] == -1).all()
    assert (both.size[0, n:] == 0).all()
    assert torch.equal(both.x[1], busy[0])
    assert torch.equal(both.assign[1], torch.arange(50))


@pytest.mark.parametrize("target", [80, 64, 50, 8])
def test_a_target_is_met_from_below(target: int) -> None:
    x = torch.randn(2, 65, 6, generator=torch.Generator().manual_seed(2))
    if target == 80 or target == 64:
        assert MustDropMerge(window=2).reduce(view(x, target=target)) is None
    elif target == 50:
        out = MustDropMerge(window=2).reduce(view(x, target=target))
        assert out is not None
        assert out.x.shape[1] == 1 + 64 - 3 * 5
        assert torch.equal(out.size.sum(1), torch.full((2, 1), 65.0))
    else:
        with pytest.raises(OptionError, match="at least 16"):
            MustDropMerge(window=2).reduce(view(x, target=target))


def test_a_line_of_patches_is_refused() -> None:
    with pytest.raises(OptionError, match="square grid"):
        MustDropMerge().reduce(view(torch.zeros(1, 11, 4)))


@pytest.mark.parametrize("name", ["timm", "clip", "open_clip"])
@torch.no_grad()
def test_in_towers(name: str) -> None:
    model, x = TOWERS[name](), pixels()
    plain = output(model, x)
    with apply_encoder(model, "mustdrop_merge", window=2, threshold=1.0) as pruning:
        close(output(model, x)[-1], plain[-1])  # nothing is that similar
        assert pruning.report().left == (64, 64) or pruning.report().left == (64,)
    with apply_encoder(model, "mustdrop_merge", window=2, threshold=0.0) as pruning:
        both = output(model, x)
        left = pruning.report().left
        alone = output(model, x[1:])
        assert pruning.report().left == left[-1:]
    assert all(n < 64 and (64 - n) % 3 == 0 for n in left)
    if len(plain) == 1:
        close(both[0][1:], alone[0], atol=1e-5, rtol=1e-5)
    with apply_encoder(model, "mustdrop_merge", window=2, ratio=0.5) as pruning:
        output(model, x)
        assert set(pruning.report().left) == {64 - 3 * 11}


def test_both_parts_in_a_model() -> None:
    """The tower's part in front, the key set of what it left in the LLM."""
    tiny = build("llava", layers=5)
    inputs = tiny.inputs(
        [["what ", ("image", picture(60, 40, 1)), " is?"], ["and ", ("image", picture(40, 40, 2)), " ok?"]]
    )
    method = [get_method("mustdrop_merge", window=2, threshold=0.2), get_method("mustdrop")]
    with tokprune.apply(tiny.model, method, ratio=0.3) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=2)
        entered = [stream.kept for stream in pruning.report().streams]
        assert all(n < 64 for n in entered)
        assert pruning.last.drops[-1].kept == tuple(kept(n, 0.3) for n in entered)
