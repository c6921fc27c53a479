"""NTK-aware scaling: the formula, the model computed with it, and the model given back."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.adapters.reference import language_model, samples
from tokprune.adapters.rope_scaling import longer_context, scaled_frequencies
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.testing import build


@pytest.mark.parametrize(("base", "size", "factor"), [(10000.0, 16, 4.0), (500000.0, 64, 1.5), (1e6, 128, 8.0)])
def test_frequencies_are_those_of_the_raised_base(base: float, size: int, factor: float) -> None:
    i = torch.arange(0, size, 2, dtype=torch.float64)
    raised = base * factor ** (size / (size - 2))
    got = scaled_frequencies(base ** -(i / size), factor)
    torch.testing.assert_close(got, raised ** -(i / size), rtol=1e-12, atol=0)
    assert float(got[0]) == 1.0
    assert float(got[-1]) == pytest.approx(float(base ** -(i[-1] / size)) / factor)


@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_it_is_the_model_with_the_raised_base_and_is_undone(family: str) -> None:
    tiny = build(family)
    inputs = tiny.inputs(samples("image")[:1])
    before = tiny.model(**inputs).logits
    rotary = [m for m in language_model(tiny.model).modules() if type(m).__name__.endswith("RotaryEmbedding")]
    buffers = {(m, n): b for m in rotary for n, b in m.named_buffers() if n.endswith("inv_freq")}
    with longer_context(tiny.model, 4):
        scaled = tiny.model(**inputs).logits
    assert float((scaled - before).abs().max()) > 1e-3
    assert all(getattr(m, n) is b for (m, n), b in buffers.items())
    assert torch.equal(tiny.model(**inputs).logits, before)
    twin = copy.deepcopy(tiny.model)
    for module in language_model(twin).modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("inv_freq") and "original" not in name:
                half = len(buffer)
                module._buffers[name] = buffer * 4.0 ** -(torch.arange(half) / (half - 1))
    torch.testing.assert_close(twin(**inputs).logits, scaled, rtol=0, atol=1e-5)


def test_an_error_inside_gives_the_model_back() -> None:
    tiny = build("llava")
    rotary = language_model(tiny.model).rotary_emb
    before = rotary.inv_freq

    def broken() -> None:
        with longer_context(tiny.model, 2):
            assert rotary.inv_freq is not before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        broken()
    assert rotary.inv_freq is before


@pytest.mark.parametrize("factor", [0.5, 0, -1, float("nan"), float("inf"), "2", True])
def test_factors_that_mean_nothing(factor: object) -> None:
    with pytest.raises(OptionError, match="at least 1"), longer_context(build("llava").model, factor):
        pass


def test_models_that_scale_already_are_refused() -> None:
    tiny = build("llava")
    language_model(tiny.model).rotary_emb.rope_type = "yarn"
    with pytest.raises(UnsupportedModelError, match="yarn"), longer_context(tiny.model, 2):
        pass
