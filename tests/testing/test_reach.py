"""What `reach` says of a vision tower is what happens in it, and the model is as it was."""

from __future__ import annotations

import pytest
import torch

from tests.encoder.all_towers import TOWERS, hooks, pixels
from tokprune.runtime.encoder import apply_encoder
from tokprune.runtime.reach import reach
from tokprune.testing import build, picture


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "fast_vlm"])
@pytest.mark.parametrize("tried", [True, False])
@torch.no_grad()
def test_answers_of_a_vlm_are_what_happens(family: str, tried: bool) -> None:
    tiny = build(family)
    inputs = tiny.inputs([["a ", ("image", picture(60, 40)), "?"]])
    plain, before = tiny.model(**inputs).logits, hooks(tiny.model)
    seen = reach(tiny.model, inputs if tried else None)
    assert torch.equal(tiny.model(**inputs).logits, plain)
    assert hooks(tiny.model) == before
    conv = family == "fast_vlm"
    assert {name: a.works for name, a in seen.signals.items()} == {
        "cls_attention": not conv,
        "received_attention:-1": not conv,
        "keys:-1": not conv,
        "encoder_features": True,
    }
    assert seen.tower.works == seen.encoder["tome"].works == (not conv)
    assert seen.encoder["apt"].works == (family == "llava")
    assert not any(a.detail.startswith("fault") for a in (*seen.signals.values(), *seen.encoder.values()))
    if conv:
        assert "no transformer blocks" in seen.signals["keys:-1"].detail
    elif tried:
        with apply_encoder(tiny.model, "tome", ratio=0.5) as pruning:
            tiny.model(**inputs)
            report = pruning.report()
        assert seen.encoder["tome"].detail.startswith(f"{report.start} patches -> {report.left[0]}")
        assert ("no [CLS]" in seen.signals["cls_attention"].detail) == (family == "qwen2_5_vl")


def test_a_bare_tower_has_no_signals_but_the_reason() -> None:
    seen = reach(TOWERS["clip"](), {"pixel_values": pixels()})
    assert seen.encoder["tome"].detail.startswith("64 patches -> 32 + 32")
    assert not seen.signals["keys:-1"].works
    assert "without an LLM" in seen.signals["keys:-1"].detail


def test_a_fault_of_ours_is_told_as_one() -> None:
    broken = TOWERS["clip"]()
    broken.encoder.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    seen = reach(broken, {"pixel_values": pixels()})
    assert seen.encoder["tome"].detail == "fault: ZeroDivisionError: division by zero"
