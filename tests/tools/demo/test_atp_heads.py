"""ATP-LLaVA's heads on the demo VLM: the answers' loss reaches the thresholds, and masks of one change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune.demo
from tokprune.demo.asking import Asker
from tokprune.methods.decoder.atp import ThresholdHeads
from tools.demo import atp_heads
from tools.demo.atp_heads import SoftPruning


def test_what_training_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, processor = tokprune.demo.load()
    heads = [ThresholdHeads() for _ in range(3)]
    soft = SoftPruning(Asker(model.requires_grad_(False), processor), heads)
    monkeypatch.setattr(atp_heads, "atp_loss", lambda masks, target: torch.zeros(()))
    loss, answers, left = soft.loss([1, 2, 3], target=64.0)
    assert 0 < left < 1
    loss.backward()  # of the answers alone
    assert all(float(h.importance.weight.grad.abs().sum()) > 0 for h in heads)

    seen: dict[str, Any] = {}
    model.register_forward_hook(lambda m, args, kw, out: seen.update(kw, logits=out.logits), with_kwargs=True)
    monkeypatch.setattr(atp_heads, "soft_mask", lambda *_: torch.ones(256))
    _, whole, left = soft.loss([1, 2, 3], target=64.0)
    assert left == 1
    assert whole != pytest.approx(answers)
    inputs = {k: seen[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        plain = tokprune.demo.load()[0](**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(seen["logits"], plain, atol=1e-4, rtol=1e-4)
