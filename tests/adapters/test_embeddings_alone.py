"""A prompt given as embeddings, without token ids: the budget is kept for each picture as with ids."""

from __future__ import annotations

import pytest
import torch

import tokprune
from tests.adapters.reference import slow_unless
from tokprune.testing import build, picture

FAMILIES = ("smolvlm", "idefics3", "aya_vision", "ovis2", "internvl")


@pytest.mark.parametrize("family", [slow_unless(f in ("smolvlm", "ovis2"), f) for f in FAMILIES])
@torch.no_grad()
def test_the_same_tokens_stay_as_with_ids(family: str) -> None:
    tiny = build(family)
    inputs = tiny.inputs(
        [["a ", ("image", picture(90, 60)), " b ", ("image", picture(50, 50)), "?"], ["c", ("image", picture(60, 90))]]
    )
    embedded = dict(inputs)
    embedded["inputs_embeds"] = tiny.model.get_input_embeddings()(embedded.pop("input_ids"))
    with tokprune.apply(tiny.model, "uniform", ratio=0.3) as pruning:
        expected = tiny.model(**inputs).logits
        kept = [(s.row, s.kept, s.total) for s in pruning.last.streams]
        found = tiny.model(**embedded).logits
        assert [(s.row, s.kept, s.total) for s in pruning.last.streams] == kept
    shown = inputs["attention_mask"].bool()  # what stands at padding is nobody's
    assert torch.allclose(found[shown], expected[shown], atol=1e-5)
