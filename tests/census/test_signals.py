"""Signals of every model type that works: what is read from its tower is what the tower's eager code computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters.reference import slow_unless
from tests.adapters.test_readers import eager_maps, received
from tests.census.models import model_types, tiny_model
from tests.census.pixels import medium
from tokprune.adapters.known import VERIFIED
from tokprune.adapters.tower_kinds import reader_of
from tokprune.adapters.towers import tower_blocks, tower_of
from tokprune.errors import MissingSignalError
from tokprune.runtime.probe import AttentionProbe

QUICK = ("kimi_k25", "minimax_m3_vl")
NO_TOWER = ("fuyu", "gemma4_unified")
OTHER_TOWERS = ("deepseek_ocr2", "got_ocr2", "inkling_mm_model", "pp_chart2table", "unlimited_ocr")
"""SAM-like, or an MLP per patch."""
OF_TIMM = ("gemma3n",)
"""timm's attention hands no weights back; tests/adapters/test_probe.py looks at it."""


@pytest.mark.parametrize("model_type", [slow_unless(name in QUICK, name) for name in VERIFIED])
@torch.no_grad()
def test_what_is_read_is_what_eager_attention_computes(model_type: str) -> None:
    if model_type not in model_types() or model_type in OF_TIMM:
        pytest.skip("not mapped by the installed transformers, or not eager")
    model: Any = tiny_model(model_type)
    base = model.base_model
    if model_type in NO_TOWER + OTHER_TOWERS:
        with pytest.raises(MissingSignalError):
            tower_blocks(tower_of(base))
        return
    tower = tower_of(base)
    blocks = tower_blocks(tower)
    readable = [i for i, block in enumerate(blocks) if reader_of(block) is not None]
    call = medium(model, "image", 1)
    with AttentionProbe(tower, readable) as probe:
        base.get_image_features(**call, return_dict=True)
        maps = eager_maps(tower, call, base.get_image_features)
        base.get_image_features(**call, return_dict=True)
        for block in readable:
            seen, reader = probe.projections(block), reader_of(blocks[block])
            assert reader is not None
            found = maps[id(reader.attention)]
            wanted = received(found if seen.segments is not None else found[-1:], seen)  # Step 3.7 runs it twice
            torch.testing.assert_close(seen.received(), wanted, atol=2e-6, rtol=0)
