"""DynamicViT: the predictor, its training formulas, a small training that finds the marked patches, and the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.encoder.all_towers import output, pixels, timm_vit
from tokprune.errors import OptionError
from tokprune.methods.encoder.dynamicvit import (
    Predictor,
    gumbel_keep,
    keep_loss,
    load_predictors,
    masked_softmax,
    save_predictors,
)
from tokprune.runtime.encoder import apply_encoder

close = torch.testing.assert_close


def test_without_weights_it_refuses_and_says_what_to_do() -> None:
    with pytest.raises(OptionError, match=r"random ones keep random patches.*save_predictors"):
        apply_encoder(timm_vit(), "dynamicvit")
    with pytest.raises(OptionError, match="holds no predictors"):
        apply_encoder(timm_vit(), "dynamicvit", weights="missing.safetensors")


def test_a_prediction_looks_at_the_patch_and_at_what_is_kept() -> None:
    torch.manual_seed(0)
    predictor, x = Predictor(16), torch.randn(2, 9, 16)
    out = predictor(x)
    close(out.exp().sum(-1), torch.ones(2, 9))
    kept = torch.ones(2, 9)
    kept[0, 4:] = 0
    far = x.clone()
    far[0, 5] = 9 * torch.randn(16)  # a dropped patch
    close(predictor(far, kept)[0, :4], predictor(x, kept)[0, :4])
    assert not torch.allclose(predictor(far)[0, :4], out[0, :4], atol=1e-4)
    local, whole = predictor.enter(x).chunk(2, -1)
    mean = whole[0, :4].mean(0)
    expected = predictor.leave(torch.cat([local[0, 1], mean])).log_softmax(-1)
    close(predictor(x, kept)[0, 1], expected, atol=1e-6, rtol=1e-6)


def test_decisions_are_hard_forwards_soft_backwards_and_final() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 50, 2).log_softmax(-1).requires_grad_()
    before = (torch.rand(4, 50) > 0.3).float()
    kept = gumbel_keep(logits, before)
    assert set(kept.detach().unique().tolist()) <= {0.0, 1.0}
    assert (kept <= before).all()
    kept.sum().backward()
    assert logits.grad is not None
    assert logits.grad[before > 0].abs().sum() > 0
    sure = torch.tensor([[[0.0, -50.0], [-50.0, 0.0]]])
    assert gumbel_keep(sure, torch.ones(1, 2)).tolist() == [[1.0, 0.0]]


def test_masked_attention_is_attention_among_the_kept() -> None:
    torch.manual_seed(0)
    logits, kept = torch.randn(2, 3, 6, 6), torch.tensor([[1.0, 1, 0, 1, 0, 1], [1.0, 1, 1, 1, 1, 1]])
    got = masked_softmax(logits, kept)
    close(got.sum(-1), torch.ones(2, 3, 6), atol=1e-5, rtol=0)
    close(got[1], logits[1].softmax(-1), atol=1e-5, rtol=0)
    stay = [0, 1, 3, 5]
    close(got[0][:, stay][:, :, stay], logits[0][:, stay][:, :, stay].softmax(-1), atol=1e-5, rtol=0)
    assert (got[0][:, stay][:, :, [2, 4]] < 1e-5).all()
    assert (got[0][:, 2, 2] > 0.01).all()  # a dropped token sees itself


def test_the_kept_share_is_pulled_to_its_powers() -> None:
    full, half = torch.ones(2, 10), torch.cat([torch.ones(2, 5), torch.zeros(2, 5)], 1)
    assert keep_loss([half], 0.5).item() == 0
    assert keep_loss([full, full], 0.5).item() == pytest.approx((0.5**2 + 0.75**2) / 2)


def test_training_finds_the_patches_that_matter(tmp_path: Path) -> None:
    """The task's loss asks for the marked patches, the ratio loss for few: the predictor must learn which they are."""
    torch.manual_seed(0)
    width, n = 24, 16
    mark = torch.randn(width)
    predictor = Predictor(width)
    optimiser = torch.optim.Adam(predictor.parameters(), lr=3e-3)

    def batch() -> tuple[Tensor, Tensor]:
        marked = torch.rand(32, n).argsort(1) < 4
        return torch.randn(32, n, width) + 1.5 * marked[..., None] * mark, marked

    for _ in range(150):
        x, marked = batch()
        kept = gumbel_keep(predictor(x), torch.ones(32, n))
        logits = torch.zeros(32, 1, n, n)
        seen = masked_softmax(logits, kept)[:, 0, 0]  # what the first token sees of the others
        task = -(seen * marked).sum(1).clamp_min(1e-4).log().mean()
        optimiser.zero_grad()
        (task + 2 * keep_loss([kept], 0.25)).backward()
        optimiser.step()
    x, marked = batch()
    chosen = predictor(x)[..., 0].topk(4).indices
    right = marked.gather(1, chosen).float().mean()
    assert right > 0.95
    save_predictors([predictor], tmp_path / "p.safetensors")
    close(load_predictors(str(tmp_path / "p.safetensors"))[0](x), predictor(x))


@torch.no_grad()
def test_a_run_keeps_the_predictors_best_before_each_stage(tmp_path: Path) -> None:
    torch.manual_seed(1)
    predictors = [Predictor(24).eval(), Predictor(24).eval()]
    path = tmp_path / "p.safetensors"
    save_predictors(predictors, path)
    model, x = timm_vit(), pixels()
    seen: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for b in model.blocks]
    output(model, x)
    full, seen[:] = list(seen), []
    with apply_encoder(model, "dynamicvit", weights=str(path), blocks=(1, 3), keep=0.5) as pruning:
        output(model, x)
    assert [h.remove() for h in handles]
    assert pruning.trace.counts == (33, 33, 17, 17)
    best = (predictors[0](full[1][:, 1:])[..., 0].topk(32).indices.sort(1).values + 1)[..., None].expand(-1, -1, 24)
    close(seen[1], torch.cat([full[1][:, :1], full[1].gather(1, best)], 1))
    last = (predictors[1](seen_before_cut(model, seen[2]))[..., 0].topk(16).indices.sort(1).values)[..., None]
    out = model.blocks[2](seen[2])
    close(seen[3][:, 1:], out[:, 1:].gather(1, last.expand(-1, -1, 24)))
    with apply_encoder(model, "dynamicvit", weights=str(path), blocks=(1, 3), ratio=0.3) as pruning:
        output(model, x)
    assert pruning.trace.survivor.sum(1).tolist() == [19, 19]


def seen_before_cut(model: torch.nn.Module, x: Tensor) -> Tensor:
    return model.blocks[2](x)[:, 1:]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_predictors([Predictor(24)], path)
    with pytest.raises(OptionError, match="1 predictors for 3 stages"):
        apply_encoder(timm_vit(), "dynamicvit", weights=str(path))
    with pytest.raises(OptionError, match="before block 0"):
        apply_encoder(timm_vit(), "dynamicvit", weights=str(path), blocks=(0,))
    save_predictors([Predictor(16)], tmp_path / "q.safetensors")
    pruning = apply_encoder(timm_vit(), "dynamicvit", weights=str(tmp_path / "q.safetensors"), blocks=(2,))
    with pytest.raises(OptionError, match="16 channels"):
        pruning.model(pixels())
