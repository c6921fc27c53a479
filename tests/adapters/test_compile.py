"""Compiled decoding over a static cache: one whole graph for all steps, pruned or not."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tokprune.testing import build, picture


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_decoding_is_one_graph(family, monkeypatch):
    testing = pytest.importorskip("torch._dynamo.testing")
    tiny = build(family)
    rows = [["a ", ("image", picture(60, 40, 1)), " b"], ["longer x ", ("image", picture(40, 40, 2)), " y"]]
    inputs = tiny.inputs(rows)
    model = tiny.model
    with tokprune.apply(model, "hired", ratio=0.3):
        wanted = model.generate(**inputs, max_new_tokens=12, cache_implementation="static")
        torch._dynamo.reset()
        counter = testing.CompileCounter()
        step = torch.compile(model.__call__, backend=counter, fullgraph=True)
        monkeypatch.setattr(model, "get_compiled_call", lambda config: step, raising=False)
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *a: True, raising=False)
        got = model.generate(**inputs, max_new_tokens=12, cache_implementation="static")
        assert counter.frame_count == 1
    assert torch.equal(got, wanted)
    torch._dynamo.reset()
